"""The drawings of docs/how/: each function returns one; DRAWINGS lists them by the name of their file."""

from collections.abc import Callable

from bench.drawing import Drawing


def flow() -> Drawing:
    """Draws the way from prompts to pictures with integers."""
    d = Drawing(
        330, "From prompts to integers",
        "octavo capture runs the pipeline and records the calls of its denoiser. octavo calibrate replays the calls, "
        "observes inputs, chooses integers and writes a checkpoint. The checkpoint is drawn with and compared.",
    )  # fmt: skip
    d.text(20, 32, "octavo capture", "mono")
    d.box(20, 44, 110, 56, ["prompts", "a text file"])
    d.box(170, 44, 220, 56, ["pipeline, in floating point", "hooks record its denoiser"], "float")
    d.box(430, 44, 230, 56, ["capture", "each call's arguments, once"])
    d.arrow([(130, 72), (170, 72)])
    d.arrow([(390, 72), (430, 72)])
    d.text(20, 140, "octavo calibrate", "mono")
    d.box(430, 152, 230, 56, ["replay", "the float denoiser, with hooks"], "float")
    d.box(225, 152, 170, 56, ["choose", "range, factors, codes"])
    d.box(20, 152, 170, 56, ["checkpoint", "integers and report"], "int")
    d.arrow([(545, 100), (545, 152)])
    d.arrow([(430, 180), (395, 180)])
    d.arrow([(225, 180), (190, 180)])
    d.text(225, 248, "octavo inspect, generate, compare", "mono")
    d.box(20, 260, 170, 50, ["check every number"], "good")
    d.box(225, 260, 170, 50, ["draw with integers"], "int")
    d.box(430, 260, 230, 50, ["float beside int8, one page"])
    d.arrow([(105, 208), (105, 260)])
    d.arrow([(190, 285), (225, 285)])
    d.arrow([(395, 285), (430, 285)])
    return d


def capture() -> Drawing:
    """Draws how equal tensors and rows of the calls of a prompt are stored once."""
    d = Drawing(
        400, "How a capture stores equal tensors once",
        "Three calls of a denoiser. Each has latents in two equal rows, and text states that are the same in all "
        "calls. The file holds each latents row once and the text states once.",
    )  # fmt: skip
    d.text(20, 34, "recorded: the arguments of every call", "head")
    d.text(430, 34, "on disk: each blob once", "head")
    for step in range(3):
        y = 54 + 96 * step
        d.box(20, y, 300, 84, kind="none")
        d.text(32, y + 20, f"call {step}, with guidance", "small muted")
        d.box(32, y + 30, 64, 20, [f"row {step}"], "float", "small")
        d.box(32, y + 54, 64, 20, [f"row {step}"], "float", "small")
        d.text(104, y + 57, "latents", "small muted")
        d.box(176, y + 30, 132, 20, ["text states: cond"], "int", "small")
        d.box(176, y + 54, 132, 20, ["text states: uncond"], "int", "small")
        d.box(470, y + 32, 150, 26, [f"latents, row {step}"], "float", "small")
        d.arrow([(320, y + 45), (470, y + 45)])
    d.box(470, 322, 150, 22, ["text states: cond"], "int", "small")
    d.box(470, 348, 150, 22, ["text states: uncond"], "int", "small")
    d.arrow([(242, 330), (242, 346), (470, 346)])
    d.text(256, 340, "once for all calls", "small muted")
    d.text(20, 388, "84 calls of SD3 at 1024 px: 522 MiB of inputs, 58 MiB on disk.", "small muted")
    return d


def store() -> Drawing:
    """Draws the files of a capture, and how a unit gets there whole or not at all."""
    d = Drawing(
        350, "The files of a capture",
        "A capture has capture.json, a folder of units and complete.json. A unit is filled in a staging directory, "
        "brought to the disk, and renamed.",
    )  # fmt: skip
    d.text(20, 34, "captured/", "mono")
    rows = (
        ("capture.json", "model, pipeline, settings; written first", 0, "box"),
        ("units/000000-9f3c…/", "the calls of one prompt", 0, "none"),
        ("data-000.safetensors", "tensors, named by SHA-256 of their bytes", 24, "float"),
        ("unit.json", "calls, arguments, extremes; sealed", 24, "box"),
        ("units/000001-41d0…/", "the next prompt", 0, "none"),
        ("complete.json", "digests of all units; absent = not finished", 0, "good"),
    )
    for number, (name, words, indent, kind) in enumerate(rows):
        y = 46 + 38 * number
        d.box(36 + indent, y, 220, 28, [name], kind, "mono")
        d.text(270 + indent, y + 19, words, "small muted")
    d.text(20, 300, "A unit is written so:", "")
    for x, width, words in ((176, 150, ".staging-…: fill"), (352, 120, "fsync files"), (498, 160, "rename the folder")):
        d.box(x, 282, width, 28, [words], "box", "small")
    d.arrow([(326, 296), (352, 296)])
    d.arrow([(472, 296), (498, 296)])
    d.text(
        20,
        336,
        "A process that is killed leaves whole units only; --resume goes on with the next prompt.",
        "small muted",
    )
    return d


def observers() -> Drawing:
    """Draws the values of an input, two ranges for them, and the codes."""
    d = Drawing(
        370, "From observed values to a range and codes",
        "A histogram of the values of a layer's input with an outlier on the right. The range of minmax reaches from "
        "the smallest to the largest value; that of percentile cuts the outlier off. 256 codes cover the range.",
    )  # fmt: skip
    d.text(20, 34, "the values that reach a layer, over all calls", "head")
    heights = (2, 5, 11, 24, 48, 84, 118, 132, 110, 76, 45, 25, 14, 8, 5, 3, 2, 2, 1, 1, 1, 0, 0, 0, 1, 2, 1)
    for number, height in enumerate(heights):
        d.rect(60 + 20 * number, 190 - height, 17, height, "bad" if number > 22 else "float")
    d.line([(50, 190), (620, 190)])
    d.text(560, 168, "outlier", "small muted", "middle")
    for y, end, name in ((222, 600, "minmax: everything"), (252, 460, "percentile, mse: clip the rest")):
        d.line([(60, y - 8), (60, y + 8)])
        d.line([(60, y), (end, y)])
        d.line([(end, y - 8), (end, y + 8)])
        d.text(330 if end == 600 else 350, y - 5, name, "small", "middle")
    d.text(215, 290, "256 codes over the range of minmax; most values get the blue ones", "small")
    for number in range(28):
        d.rect(60 + 20 * number, 304, 18, 18, "int" if 1 < number < 14 else "box")
    d.text(60, 342, "-128", "mono", "middle")
    d.text(200, 342, "zero point", "mono", "middle")
    d.text(600, 342, "127", "mono", "middle")
    d.line([(200, 190), (200, 304)], "line dash")
    d.text(
        60,
        362,
        "The outlier leaves the bulk of the values few codes: smoothing, rotation or clipping helps.",
        "small muted",
    )
    return d


def smoothing() -> Drawing:
    """Draws how smoothing moves an outlier into the weight, and where the factors are folded."""
    d = Drawing(
        500, "What smoothing does, and where its factors go",
        "Each channel of the input is divided by a factor and the weights of the channel are multiplied by it. The "
        "division is folded into the modulation of a norm or into the value layer, or stays a multiplier.",
    )  # fmt: skip
    d.text(20, 34, "a channel of the input is an outlier", "head")
    for number, (before, after) in enumerate(((22, 24), (30, 28), (110, 44), (26, 26), (18, 22))):
        d.rect(40 + 26 * number, 170 - before, 20, before, "bad" if number == 2 else "float")
        d.rect(400 + 26 * number, 170 - after, 20, after, "float")
    for number, (before, after) in enumerate(((40, 38), (36, 38), (14, 40), (40, 40), (44, 40))):
        d.rect(200 + 26 * number, 170 - before, 20, before, "int")
        d.rect(540 + 24 * number, 170 - after, 18, after, "int")
    d.line([(30, 170), (175, 170)])
    d.line([(192, 170), (335, 170)])
    d.line([(392, 170), (535, 170)])
    for x, words in ((102, "x"), (262, "W"), (462, "x / s"), (598, "W · s")):
        d.text(x, 190, words, "", "middle")
    d.arrow([(345, 120), (385, 120)])
    d.text(20, 226, "W x = (W · s)(x / s): the output stays, the range of the input shrinks.", "small muted")
    d.text(20, 264, "where 1 / s goes", "head")
    places = (
        ("modulated norm", "rows of scale and shift / s", "to_q  to_k  to_v · s", "SD3, Flux, Qwen-Image"),
        ("to_v", "rows / s, through attention", "to_out · s", "every attention without own processor weights"),
        (
            "anything else",
            "x · mul_scale when the layer runs",
            "the layer · s",
            "formats with a multiplier: ascend, diffusers",
        ),
    )
    for number, (source, change, target, where) in enumerate(places):
        y = 282 + 70 * number
        d.box(20, y, 260, 44, [source, change], "float" if number < 2 else "box")
        d.box(400, y, 260, 44, [target], "int")
        d.arrow([(280, y + 22), (400, y + 22)], "x / s")
        d.text(20, y + 60, where, "small muted")
    return d


def rounding() -> Drawing:
    """Draws GPTQ, and the judgement on held-out rows."""
    d = Drawing(
        400, "How the codes of a weight are chosen",
        "GPTQ rounds one column of the weight after the other and lets the later columns take up the error. Held-out "
        "rows judge whether the result is better than rounding to the nearest.",
    )  # fmt: skip
    d.text(20, 34, "GPTQ: column by column", "head")
    for number in range(9):
        kind = "int" if number < 4 else "good" if number == 4 else "float"
        d.rect(40 + 34 * number, 56, 30, 120, kind)
    d.text(106, 196, "codes", "small muted", "middle")
    d.text(191, 196, "now", "small muted", "middle")
    d.text(280, 196, "still float", "small muted", "middle")
    d.arrow([(192, 50), (192, 42), (330, 42), (330, 54)])
    d.text(352, 48, "its error moves into these,", "small muted")
    d.text(366, 100, "so that the layer's output,", "small")
    d.text(366, 120, "not the weight, comes close:", "small")
    d.text(366, 146, "min |W x - Wq xq| over calls", "mono")
    d.text(20, 234, "which result is kept", "head")
    d.box(20, 250, 200, 48, ["sums over 96 calls", "xq xqᵀ and xq (x - xq)ᵀ"])
    d.box(260, 250, 170, 48, ["GPTQ, ADMM, …", "codes, scale"])
    d.box(260, 318, 170, 48, ["nearest", "codes, scale"])
    d.box(470, 284, 190, 48, ["512 held-out tokens", "the less error wins"], "good")
    d.arrow([(220, 274), (260, 274)])
    d.arrow([(430, 274), (470, 300)])
    d.arrow([(430, 342), (470, 316)])
    d.box(20, 318, 200, 48, ["the float weight"], "float")
    d.arrow([(220, 342), (260, 342)])
    d.text(20, 388, "The calls behind the sums and the calls that judge are different ones.", "small muted")
    return d


def layer() -> Drawing:
    """Draws what a static int8 layer computes."""
    d = Drawing(
        330, "What an int8 layer computes",
        "The float input is multiplied by the smoothing multiplier, divided by the scale, shifted by the zero point, "
        "rounded and clamped to int8 codes. They are multiplied by int8 weights into int32 sums, to which quant_bias "
        "is added, and which deq turns into the float output.",
    )  # fmt: skip
    d.box(20, 40, 90, 50, ["x", "float"], "float")
    d.box(140, 40, 130, 50, ["x · mul_scale", "if smoothed"], "float")
    d.box(
        300,
        40,
        360,
        50,
        ["round(x / scale + zero_point), clamp to int8", "one range (static), or one for each token (dynamic)"],
    )
    d.arrow([(110, 65), (140, 65)])
    d.arrow([(270, 65), (300, 65)])
    d.box(300, 130, 170, 50, ["x_q", "int8 codes"], "int")
    d.box(500, 130, 160, 50, ["weight", "int8, from the file"], "int")
    d.arrow([(385, 90), (385, 130)])
    d.box(300, 220, 360, 50, ["Σ x_q · weight", "int32: exact"], "int")
    d.arrow([(385, 180), (385, 220)])
    d.arrow([(580, 180), (580, 220)])
    d.box(150, 220, 120, 50, ["+ quant_bias", "int32"], "int")
    d.arrow([(300, 245), (270, 245)])
    d.box(20, 220, 100, 50, ["· deq", "y, float"], "float")
    d.arrow([(150, 245), (120, 245)])
    d.text(
        20,
        304,
        "quant_bias holds the bias, its correction and the effect of the zero point; deq is input scale times",
        "small muted",
    )
    d.text(20, 321, "weight scale. Calibration measures the accuracy with exactly these numbers.", "small muted")
    return d


def formats() -> Drawing:
    """Draws the formats of a checkpoint and who loads them."""
    d = Drawing(
        430, "One set of integers, several formats",
        "A calibration has one set of numbers for each layer. Nine formats write them, each for another runtime.",
    )  # fmt: skip
    d.box(
        20,
        150,
        190,
        110,
        ["numbers of a layer", "weight, int8", "weight_scale, input_scale", "quant_bias, deq", "mul_scale"],
        "int",
    )
    rows = (
        ("ascend", "MindIE-SD on an Ascend NPU"), ("diffusers", "diffusers with import octavo"),
        ("torchao", "diffusers with torchao"), ("comfy", "ComfyUI"), ("sglang", "SGLang-diffusion, Ascend NPU"),
        ("vllm-omni", "vLLM-Omni, CUDA and Ascend"), ("sdnq", "diffusers with sdnq"),
        ("onnx", "onnxruntime, OpenVINO"), ("ascend-onnx", "Ascend's compiler"),
    )  # fmt: skip
    for number, (name, runtime) in enumerate(rows):
        y = 30 + 39 * number
        d.box(280, y, 120, 28, [name], "box", "mono")
        d.arrow([(210, 205), (280, y + 14)])
        d.arrow([(400, y + 14), (430, y + 14)])
        d.text(438, y + 19, runtime, "small", "start")
    d.text(
        20, 398, "A format renames tensors and adds descriptions. It never rounds again, so the integers", "small muted"
    )
    d.text(20, 416, "whose accuracy was measured are the integers that a runtime loads.", "small muted")
    return d


def rooms() -> Drawing:
    """Draws the packages and their order of imports."""
    d = Drawing(
        430, "The packages and their order of imports",
        "capture imports nothing of Octavo. prompts, pipelines and calibrate import capture. octavo imports all. "
        "Inside calibrate there is an order too.",
    )  # fmt: skip
    d.box(20, 24, 640, 44, ["octavo: commands, comparing, page", "what is installed and imported"], "good")
    d.box(20, 104, 300, 44, ["pipelines", "families, loading, demo, digits"])
    d.box(360, 104, 300, 44, ["calibrate", "from calls to a checkpoint"], "int")
    d.box(20, 184, 300, 44, ["prompts", "sets and files of prompts"])
    d.box(360, 184, 300, 44, ["capture", "Listener, store, files, errors"])
    for x in (170, 510):
        d.arrow([(x, 68), (x, 104)])
    d.arrow([(510, 148), (510, 184)])
    d.arrow([(240, 148), (400, 184)])
    d.arrow([(320, 206), (360, 206)])
    d.arrow([(30, 68), (30, 84), (10, 84), (10, 206), (20, 206)], dash=True)
    d.text(20, 262, "inside calibrate, from what is imported to what imports", "head")
    rows = (
        ("layers", "replay", "plan · runtime"), ("observers", "preparation", "smoothing"),
        ("rounding", "mixed_precision", "formats"), ("choose", "calibration", "blockwise · API"),
    )  # fmt: skip
    for number, names in enumerate(rows):
        y = 276 + 34 * number
        for column, name in enumerate(names):
            d.box(20 + 220 * column, y, 200, 26, [name], "int", "mono")
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "flow": flow,
    "capture": capture,
    "store": store,
    "observers": observers,
    "smoothing": smoothing,
    "rounding": rounding,
    "layer": layer,
    "formats": formats,
    "rooms": rooms,
}
