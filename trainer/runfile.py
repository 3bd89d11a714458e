"""run.yaml as processes of the trainer's side read it."""

from pathlib import Path

from pydantic import ValidationError

from trainer.contract.config import RunConfig
from trainer.errors import SetupError


def read_config(path: Path) -> RunConfig:
    """run.yaml as the supervisor resolved it: JSON, which is YAML.

    Raises:
        SetupError: it is missing, or not a configuration.
    """
    try:
        return RunConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise SetupError(f"{path} is missing", "start the run with `longwatch launch`") from error
    except ValidationError as error:
        raise SetupError(f"{path} is not a configuration ({error})", "start it with `longwatch launch`") from error
