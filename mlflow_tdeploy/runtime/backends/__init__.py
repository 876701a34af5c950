"""Runtimes: one file each, discovered by :data:`mlflow_tdeploy.runtime.base.RUNTIMES`."""
