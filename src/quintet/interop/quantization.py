"""Transformers knows the name under which weights in our own formats are written."""

__all__ = ["tell_of_our_formats"]

METHOD = "quintet"


def tell_of_our_formats() -> None:
    """Register `quant_method: quintet` with Transformers, where tools look a configuration up.

    What it makes of one is an object that holds it. Transformers still loads no such checkpoint.
    """
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return

    class QuintetConfig(QuantizationConfigMixin):
        """The `quantization_config` of a checkpoint, as it is."""

        def __init__(self, quant_method: str = METHOD, **values: object) -> None:
            super().__init__(quant_method=quant_method)  # type: ignore[arg-type]
            self.__dict__.update(values)

    register_quantization_config(METHOD)(QuintetConfig)
