"""What Transformers makes of the configuration of weights in our own formats."""

from transformers.quantizers.auto import AutoQuantizationConfig

from quintet.interop.quantization import tell_of_our_formats


def test_the_configuration_is_held_as_it_is() -> None:
    tell_of_our_formats()
    tell_of_our_formats()
    written = {"quant_method": "quintet", "format": "int4", "modules_to_not_convert": ["lm_head"]}
    assert AutoQuantizationConfig.from_dict(written).to_dict() == written
