"""The model's modules: their shapes, masks and shared weights, and the configurations that size them."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from mige_rt.config import PRESETS, ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, GraphName
from trainer.model.dit import sincos_positions
from trainer.model.mige import Mige

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def model() -> Mige:
    torch.manual_seed(0)
    model = Mige(TINY).eval()
    torch.nn.init.normal_(model.image_encoder.fusion.mlp.weight, std=0.1)
    return model.requires_grad_(False)


def _inputs(batch: int, images: int, length: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """An input for every tensor spec of every graph, at the sizes given."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    dit, latent = TINY.dit, TINY.dit.trained_grid * TINY.dit.patch
    slot_index = torch.full((batch, length), -1)
    slot_index[:, 1 : 1 + TINY.qformer.queries] = torch.arange(TINY.qformer.queries)
    return {
        "pixels_vae": normal(batch, 3, height * TINY.vae.factor, width * TINY.vae.factor),
        "pixels_vit": normal(images, 3, TINY.vision.side, TINY.vision.side),
        "ref_latents": normal(images, TINY.vae.channels, latent, latent),
        "token_ids": torch.randint(TINY.text.vocabulary, (batch, length), generator=draw),
        "image_tokens": normal(images, TINY.qformer.queries, TINY.text.width),
        "slot_index": slot_index,
        "text_mask": torch.ones(batch, length, dtype=torch.bool),
        "text_states": normal(batch, length, TINY.text.width),
        "has_text": torch.tensor([b % 2 == 0 for b in range(batch)]),
        "latents": normal(batch, TINY.vae.channels, height, width),
        "source": normal(batch, TINY.vae.channels, height, width),
        "timestep": torch.full((batch,), 500.25),
        "cross_kv": normal(2, dit.depth, batch, dit.heads, length, dit.width // dit.heads),
    }


@pytest.mark.parametrize("sizes", [(1, 1, 40, 16, 16), (3, 4, 40, 8, 24)])
@pytest.mark.parametrize("graph", GRAPHS)
def test_each_module_has_the_tensor_specs_of_its_graph(
    model: Mige, graph: GraphName, sizes: tuple[int, int, int, int, int]
) -> None:
    inputs = _inputs(*sizes)
    known: dict[str, int] = {"f": TINY.vae.factor}

    def check(axes: tuple[str, ...], shape: torch.Size, name: str) -> None:
        assert len(axes) == len(shape), name
        for axis, size in zip(axes, shape, strict=True):
            expected = int(axis) if axis.isdigit() else known.setdefault(axis, size) if "*" not in axis else None
            assert expected in (size, None), f"{name}: axis {axis} is {size}, expected {expected}"

    specs = GRAPHS[graph]
    for spec in specs.inputs:
        check(spec.axes, inputs[spec.name].shape, spec.name)
        assert str(inputs[spec.name].dtype) == f"torch.{spec.dtype}"
    outputs = model.graph(graph)(*(inputs[spec.name] for spec in specs.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == len(specs.outputs)
    for spec, output in zip(specs.outputs, outputs, strict=True):
        check(spec.axes, output.shape, spec.name)
        assert str(output.dtype) == f"torch.{spec.dtype}"


def _text(model: Mige, i: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.text_encoder(i["token_ids"], i["image_tokens"], i["slot_index"], i["text_mask"])


def _noise(model: Mige, i: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.denoiser(i["latents"], i["source"], i["timestep"], i["cross_kv"], i["text_mask"])


@pytest.mark.parametrize("run", [_text, _noise])
def test_padding_to_a_longer_prompt_changes_nothing(
    model: Mige, run: Callable[[Mige, dict[str, torch.Tensor]], torch.Tensor]
) -> None:
    padded = _inputs(2, 1, 36, 16, 16)
    padded["text_mask"][:, 30:] = False
    names = {"token_ids", "slot_index", "text_mask"}
    short = {name: value[:, :30] if name in names else value for name, value in padded.items()}
    short["cross_kv"] = padded["cross_kv"][..., :30, :]
    long_out, short_out = run(model, padded), run(model, short)
    if run is _text:
        long_out = long_out[:, :30]
    torch.testing.assert_close(long_out, short_out, rtol=1e-4, atol=1e-4)


def test_without_text_the_null_embeddings_are_used_alone(model: Mige) -> None:
    inputs = _inputs(2, 1, 40, 16, 16)
    kv = model.conditioner(inputs["text_states"], torch.tensor([True, False]))
    other = model.conditioner(inputs["text_states"] + 1, torch.tensor([True, False]))
    assert torch.equal(kv[:, :, 1], other[:, :, 1]) and not torch.equal(kv[:, :, 0], other[:, :, 0])
    null = model.conditioner(model.conditioner.y_embedding[None, :40], torch.tensor([True]))
    torch.testing.assert_close(kv[:, :, 1], null[:, :, 0])


def test_image_tokens_stand_in_their_slots(model: Mige) -> None:
    inputs = _inputs(2, 3, 36, 16, 16)
    queries = TINY.qformer.queries
    inputs["slot_index"][1, 1 : 1 + queries] = torch.arange(queries) + 2 * queries
    mixed = model.text_encoder.mix(inputs["token_ids"], inputs["image_tokens"], inputs["slot_index"])
    assert torch.equal(mixed[0, 1 : 1 + queries], inputs["image_tokens"][0])
    assert torch.equal(mixed[1, 1 : 1 + queries], inputs["image_tokens"][2])
    text = model.text_encoder.t5.get_input_embeddings()(inputs["token_ids"])
    assert torch.equal(mixed[:, 1 + queries :], text[:, 1 + queries :])


def test_fusion_and_denoiser_share_the_patch_embedder(model: Mige) -> None:
    assert model.image_encoder.patch_embedder is model.denoiser.x_embedder


def test_positions_at_other_sizes_span_what_the_trained_grid_spans() -> None:
    trained, wide = sincos_positions(8, 8, 64, 8).reshape(8, 8, 64), sincos_positions(8, 16, 64, 8).reshape(8, 16, 64)
    torch.testing.assert_close(wide[0, ::2], trained[0])  # 16 columns, half as far apart as 8
    torch.testing.assert_close(wide[::2, 0], trained[:4, 0])  # rows keep the same pitch as columns


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_json(preset: str) -> None:
    import json

    assert ModelConfig.from_json(json.loads(json.dumps(PRESETS[preset].to_json()))) == PRESETS[preset]


def test_a_configuration_says_all_that_is_wrong_with_it() -> None:
    data = TINY.to_json()
    data["prediction"] = "x0"
    data["dit"]["depth"] = "many"
    data["dit"]["colour"] = 3
    del data["vae"]["scale"]
    with pytest.raises(InputError) as error:
        ModelConfig.from_json(data)
    for part in ("dit.depth is 'many'", "unknown config.dit.colour", "missing config.vae.scale", "prediction is 'x0'"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("dit", "heads", 5), ("vae", "scale", 0.0), ("vae", "widths", []), ("qformer", "fusion_heads", 5)],
)
def test_sizes_that_do_not_fit_together_are_refused(section: str, field: str, value: object) -> None:
    data = TINY.to_json()
    data[section][field] = value
    with pytest.raises(InputError, match=f"{section}.*{field}"):
        ModelConfig.from_json(data)


def test_published_sizes() -> None:
    """The paper's model: 512 px images, 6.6 B parameters but for the VAE."""
    config = PRESETS["xl"]
    with torch.device("meta"):
        model = Mige(config)
    parameters = {id(p): p.numel() for name, p in model.named_parameters() if not name.startswith("vae_")}
    assert config.size == 512 and config.vae.factor == 8
    assert 6.4e9 < sum(parameters.values()) < 6.7e9


def test_the_default_stays_a_few_million_parameters() -> None:
    model = Mige(dataclasses.replace(TINY))
    assert sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()) < 10e6
