"""MLflow flavor for transformers in production: one bundle of verified variants, the host picks the best."""
