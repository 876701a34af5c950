"""The MLflow flavor: save, log, load, pyfunc, signature, artifact scheme."""
