"""Finds out under which name of diffusers' `cache_context` ("cond", "uncond", ...) a pipeline calls its denoiser."""

from types import TracebackType
from typing import Any, Self

from diffusers.hooks.hooks import HookRegistry, StateManager
from torch import nn

_KEY = "octavo_context"  # the name of the hook in diffusers' registry


class CacheContextHook:
    """A hook that receives the cache context ("cond", "uncond", ...) of a module's calls while its `with` block runs.

    diffusers passes the context to every stateful hook in the module's hook registry. This hook registers itself
    there without changing the module's forward. `name` is the last context passed. For a module without the method
    `cache_context` nothing is registered, and `name` stays None.
    """

    _is_stateful = True

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._made_registry = False
        self.manager = StateManager(dict)  # type: ignore[arg-type]

    @property
    def name(self) -> str | None:
        """The last cache context that the pipeline set; None if it has set none."""
        context = getattr(self.manager, "_context", None) or getattr(self.manager, "_current_context", None)
        return getattr(context, "name", context)

    def _set_context(self, module: nn.Module, name: Any) -> None:  # diffusers before 0.42 passes the context here
        self.manager.set_context(name)

    def reset_state(self, module: nn.Module) -> None:
        """Does nothing when diffusers resets all hooks of the module, because only the pipeline changes the context."""

    def __enter__(self) -> Self:
        if hasattr(self._module, "cache_context"):
            self._made_registry = "_diffusers_hook" not in self._module.__dict__
            registry = HookRegistry.check_if_exists_or_initialize(self._module)
            registry.hooks[_KEY] = self  # type: ignore[assignment]
            registry._hook_order.append(_KEY)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        registry = self._module.__dict__.get("_diffusers_hook")
        if registry is not None and registry.hooks.pop(_KEY, None) is not None:
            registry._hook_order.remove(_KEY)
            if self._made_registry and not registry.hooks:
                del self._module._diffusers_hook
