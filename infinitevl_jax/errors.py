"""The one exception that users of this package are meant to read."""


class InfiniteVLError(ValueError):
    """Input, file or setting that cannot work. The message names the culprit, then the cure; it fits on one screen."""

    def __init__(self, culprit: str, cure: str):
        super().__init__(f"{culprit}\n  -> {cure}")
        self.culprit = culprit
        self.cure = cure

    def __reduce__(self):
        return type(self), (self.culprit, self.cure)  # so that a data worker's error crosses to the main process
