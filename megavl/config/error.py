"""The one error of a configuration: everything that is wrong with it, at once."""


class ConfigError(ValueError):
    """A configuration that cannot be run. `problems` has one readable line per defect."""

    def __init__(self, where: str, problems: list[str]):
        self.problems = problems
        super().__init__("\n  ".join([f"{where}:", *problems]))
