"""``python -m mlflow_tdeploy.cli``: the command line where no script is on the path."""

from mlflow_tdeploy.cli import main

if __name__ == "__main__":
    main()
