"""The resolutions, aspects and durations that the model was trained on, and the latent sizes for them.

Source: the tables of Open-Sora v1.2. An aspect is height:width, so "9:16" is landscape. This module needs no torch.
"""

from dataclasses import dataclass

from octavo.capture.errors import UsageError

from .defaults import VAE_FACTOR

RESOLUTIONS = ("144p", "240p", "360p", "480p", "720p", "1080p")

_PIXELS = """
3:8    117x312  196x522  294x784  392x1046  588x1568   882x2352
9:21   125x291  210x490  314x732  420x980   628x1466   942x2198
12:25  133x277  222x462  332x692  444x925   666x1388   998x2080
1:2    135x270  226x452  340x680  452x904   678x1356   1018x2036
9:17   139x262  232x438  350x662  466x880   698x1318   1048x1980
27:50  141x260  236x436  352x652  470x870   706x1306   1058x1958
9:16   144x256  240x426  360x640  480x854   720x1280   1080x1920
5:8    151x241  252x404  380x608  506x810   758x1212   1138x1820
2:3    156x234  262x393  392x588  522x784   784x1176   1176x1764
3:4    166x221  276x368  416x554  554x738   832x1110   1248x1664
1:1    192x192  320x320  480x480  640x640   960x960    1440x1440
4:3    221x165  370x278  554x416  740x555   1108x832   1662x1246
3:2    235x156  392x262  588x392  784x522   1176x784   1764x1176
16:9   256x144  426x240  640x360  854x480   1280x720   1920x1080
17:9   263x139  440x232  660x350  880x466   1320x698   1980x1048
2:1    271x135  452x226  678x340  906x454   1358x680   2036x1018
50:27  277x132  462x222  692x332  924x444   1386x666   2078x998
"""

SIZES: dict[str, dict[str, tuple[int, int]]] = {
    aspect: {
        resolution: (int(height), int(width))
        for resolution, (height, width) in zip(RESOLUTIONS, (cell.split("x") for cell in cells), strict=True)
    }
    for aspect, *cells in (line.split() for line in _PIXELS.strip().splitlines())
}
ASPECTS = tuple(SIZES)

DURATIONS = {
    **{"2s": 51, "4s": 102, "8s": 204, "16s": 408, "32s": 816},
    **{"1x": 51, "2x": 102, "4x": 204, "8x": 408, "16x": 816},
    "image": 1,
}


def video_size(resolution: str, aspect: str) -> tuple[int, int]:
    """Returns the size (height, width) in pixels of a resolution ("240p") at an aspect ("9:16", height first).

    Raises UsageError for a name that is not in the table.
    """
    if aspect not in SIZES:
        raise UsageError(f"aspect: {aspect!r} is unknown. Use one of {', '.join(ASPECTS)}.")
    if resolution not in SIZES[aspect]:
        raise UsageError(f"resolution: {resolution!r} is unknown. Use one of {', '.join(RESOLUTIONS)}.")
    return SIZES[aspect][resolution]


def frame_count(frames: int | str) -> int:
    """Returns `frames` as a number of frames: a whole number, also given as a text, or the name of a duration. "2s" and
    "1x" are 51 frames, "4s" and "2x" 102, and so on up to "32s" and "16x"; "image" is 1 frame.

    Raises UsageError for any other text, and for a number below 1.
    """
    if isinstance(frames, str) and frames in DURATIONS:
        return DURATIONS[frames]
    try:
        count = int(frames)
    except ValueError:
        count = 0
    if count < 1:
        names = ", ".join(DURATIONS)
        raise UsageError(f"frames: {frames!r} is no duration. Give a number of frames from 1, or one of {names}.")
    return count


def latent_frames(frames: int) -> int:
    """Returns the number of latent frames of a video: 5 for every 17 frames, 1 for every 4 of the rest, rounded up."""
    clips, rest = divmod(frames, 17)
    return clips * 5 + -(-rest // 4)


def latent_size(height: int, width: int, frames: int, factor: int = VAE_FACTOR) -> tuple[int, int, int]:
    """Returns the latent size (frames, height, width) of a video of `height` x `width` pixels and `frames` frames.

    `factor` is the number of pixels of one latent position along a side. Raises UsageError for a height or width below
    `factor`.
    """
    if min(height, width) < factor:
        raise UsageError(f"size: {height}x{width} pixels are too few. Use at least {factor}x{factor}.")
    return latent_frames(frames), height // factor, width // factor


@dataclass(frozen=True)
class VideoSettings:
    """The settings of one run. `aspect` is height:width; `frames` a number or the name of a duration, such as "2s"."""

    resolution: str = "240p"
    aspect: str = "9:16"
    frames: int | str = 51
    fps: float = 24
    steps: int = 30

    @property
    def size(self) -> tuple[int, int]:
        """The size (height, width) in pixels."""
        return video_size(self.resolution, self.aspect)

    @property
    def latents(self) -> tuple[int, int, int]:
        """The size (frames, height, width) of the latents."""
        return latent_size(*self.size, frame_count(self.frames))
