"""What TorchServe calls for whole slides; a copy of this file stands in each archive of theirs."""

from serving.handling import Handler
from serving.kinds import SlideAnswerer


class SlideHandler(Handler):
    """Answers batches of such requests from the archive that it was unpacked with."""

    answerer = SlideAnswerer
