"""Lists the packages from PyPI that vLLM-Omni and SGLang import on a CPU, besides those of Octavo's environment."""

UTILITIES = (
    "addict==2.4.0", "aenum==3.1.16", "aiohappyeyeballs==2.7.1", "aiohttp==3.14.5", "aiosignal==1.4.0",
    "annotated-types==0.8.0", "astor==0.8.1", "attrs==26.1.0", "av==18.1.0", "blake3==1.0.11", "cache-dit==1.5.0",
    "cachetools==8.0.2", "cbor2==6.3.0", "cloudpickle==3.1.3", "compressed-tensors==0.20.1", "depyf==0.20.0",
    "dill==0.4.1", "diskcache==5.6.3", "einops==0.8.2", "fastapi==0.165.0", "frozenlist==1.8.0", "gguf==0.19.0",
    "imageio==2.38.1", "ipython==9.18.1", "janus==2.0.0", "lark==1.3.1", "llguidance==1.9.1",
    "lm-format-enforcer==0.11.3", "loguru==0.7.3", "msgspec==0.23.0", "multidict==7.2.1", "ninja==1.13.2",
    "omegaconf==2.4.0", "openai==3.57.0", "openai-harmony==0.0.8", "orjson==3.13.0",
    "partial-json-parser==0.2.1.1.post7", "prettytable==3.18.0", "prometheus-client==0.26.0", "propcache==0.5.4",
    "py-cpuinfo==9.0.0", "pybase64==1.5.1", "pydantic==2.14.4", "pydantic-core==2.50.5", "pydantic-settings==2.16.3",
    "python-dotenv==1.2.4", "python-json-logger==4.2.0", "pyzmq==27.3.0", "regex==2026.11.19", "sentencepiece==0.2.3",
    "setproctitle==1.3.8", "sniffio==1.3.1", "starlette==1.10.0", "tiktoken==0.14.0", "traitlets==5.16.1",
    "typing-inspection==0.4.5", "uvloop==0.23.0", "watchfiles==1.3.0", "wcwidth==0.9.4", "yarl==1.25.1",
)  # fmt: skip
VLLM_OMNI = ("vllm==0.30.0", "vllm-omni==0.30.0", *UTILITIES)
SGLANG = ("sglang==0.5.23", *UTILITIES)
# modules that ask whether a package is installed, and so are imported before stand-ins of packages
ASK_FIRST = ("torch._inductor.compile_fx", "transformers.image_utils", "transformers.modeling_utils", "diffusers")
# modules that have no use on a CPU, or that only a server or a training needs; `stand_in` makes them empty
ABSENT = ("opentelemetry", "tvm_ffi", "xgrammar", "torchvision", "mistral_common", "anthropic")
ABSENT_FOR_VLLM = (*ABSENT, "vllm.parser", "vllm.distributed.kv_transfer")
ABSENT_FOR_SGLANG = (*ABSENT, "triton", "torch_npu")
