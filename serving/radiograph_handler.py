"""What TorchServe calls for 2D radiographs; a copy of this file stands in each archive of theirs."""

from serving.handling import Handler
from serving.kinds import RadiographAnswerer


class RadiographHandler(Handler):
    """Answers batches of such requests from the archive that it was unpacked with."""

    answerer = RadiographAnswerer
