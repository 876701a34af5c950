"""From any accepted model to a :class:`~mlflow_tdeploy.source.base.Source`."""
