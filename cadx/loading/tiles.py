"""How a slide becomes tiles, as data: without torch and without OpenSlide."""

from pydantic import Field

from cadx.transforms import Preprocessing


class TilePreprocessing(Preprocessing):
    """How a slide becomes tiles, and a tile the encoder's input: part of the bundle.

    Tiles of `tile_px` pixels of `mpp` um each lie on a grid from the slide's top left corner, without overlap; those
    with at least `minimum_tissue` of tissue are taken.
    """

    tile_px: int = Field(ge=8, description="side of a tile, before it is resized to height_px x width_px")
    mpp: float = Field(default=0.5, gt=0, description="um per pixel of a tile, whatever the slide's own")
    minimum_tissue: float = Field(default=0.5, gt=0, le=1, description="least part of a tile that is tissue")
