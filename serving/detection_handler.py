"""What TorchServe calls for models that answer with boxes; a copy of this file stands in each archive of theirs."""

from serving.handling import Handler
from serving.kinds import DetectionAnswerer


class DetectionHandler(Handler):
    """Answers batches of such requests from the archive that it was unpacked with."""

    answerer = DetectionAnswerer
