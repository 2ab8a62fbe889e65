"""What TorchServe calls for volumes; a copy of this file stands in each archive of theirs."""

from serving.handling import Handler
from serving.kinds import VolumeAnswerer


class VolumeHandler(Handler):
    """Answers batches of such requests from the archive that it was unpacked with."""

    answerer = VolumeAnswerer
