"""ComfyUI finds the nodes of this pack by `comfy_entrypoint`."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
