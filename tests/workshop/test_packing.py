"""Models as text: read back here by other means than the page's, and no farther from the model than the bits allow."""

import base64
import json
import zlib

import numpy as np
import torch

from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training.tokenizer import load_tokenizer
from workshop.live import standalone
from workshop.packing import pack, pack_tokenizer


def small_model():
    config = MoEConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_experts=3
    )
    return MoEForCausalLM(config, seed=1)


def unpacked(packed):
    """The tensors by name, read from the front, as weights.js says the bytes lie."""
    data = zlib.decompress(base64.b85decode(packed["weights"])[: packed["size"]])
    shapes = {name: (shape, bits) for name, shape, bits in packed["tensors"]}
    halves = sum(np.prod(shape) if bits == 16 else np.prod(shape[:-1]) for shape, bits in shapes.values())
    planes = np.frombuffer(data[: 2 * int(halves)], np.uint8).reshape(2, -1)
    numbers = iter(np.ascontiguousarray(planes.T).view(">f2").ravel().astype(np.float64))
    integers = iter(np.frombuffer(data[2 * int(halves) :], np.int8).astype(np.float64))
    found = {}
    for name, (shape, bits) in shapes.items():
        if bits == 16:
            found[name] = np.array([next(numbers) for _ in range(np.prod(shape))]).reshape(shape)
        else:
            rows = [
                next(numbers) * np.array([next(integers) for _ in range(shape[-1])]) for _ in range(np.prod(shape[:-1]))
            ]
            found[name] = np.array(rows).reshape(shape)
    assert next(integers, None) is None and next(numbers, None) is None
    return found


def test_sixteen_bits_are_those_of_float16():
    model = small_model()
    for name, tensor in unpacked(pack(model)).items():
        assert np.array_equal(tensor, model.state_dict()[name].half().double().numpy()), name


def test_eight_bits_are_within_half_a_step_and_routers_keep_sixteen():
    model = small_model()
    packed = pack(model, bits=8)
    assert {bits for name, _, bits in packed["tensors"] if name.endswith(("gate.weight", "norm.weight"))} == {16}
    for name, tensor in unpacked(packed).items():
        wanted = model.state_dict()[name].double().numpy()
        step = np.abs(wanted).max(-1, keepdims=True) / 127 if wanted.ndim > 1 else np.abs(wanted)
        assert (np.abs(tensor - wanted) <= 0.57 * step + 1e-6).all(), name  # the scale is rounded too
    assert len(packed["weights"]) < 0.7 * len(pack(model)["weights"])


def test_rows_of_zeros_stay_so():
    model = small_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = 0
    assert not unpacked(pack(model, bits=8))["model.embed_tokens.weight"][3].any()


def test_the_tokenizer_keeps_the_order_of_tokens_and_merges():
    tokenizer = load_tokenizer()
    packed, saved = pack_tokenizer(tokenizer.to_str()), json.loads(tokenizer.to_str())["model"]
    assert [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())] == packed["tokens"]
    assert packed["merges"] == saved["merges"]


def test_a_page_in_one_file_asks_for_nothing_and_has_two_scripts():
    page = standalone("mixture")
    assert page.count("<script>") == page.count("</script>") == 2
    assert "<link" not in page and " src=" not in page.split("<script>")[0] and "<a " not in page.split("<script>")[0]
