"""Who fills the pipelines' roles: OpenCV, and the real classes of transformers at tiny sizes with random weights."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_networks import save_clip, save_detector, save_segmenter, save_tokenizer

from mige_rt.errors import InputError
from trainer.masks import iou
from trainer.pipelines.add import add_stages
from trainer.pipelines.aesthetic import load_head
from trainer.pipelines.chat import Question, TransformersChat
from trainer.pipelines.config import LamaRole, PipelineConfig, RoleConfigs, TransformersRole, check_json
from trainer.pipelines.lama import Lama
from trainer.pipelines.language import PROMPTS, Prompts
from trainer.pipelines.loaders import Roles, identities
from trainer.pipelines.opencv import GrabCut, Telea, dilate
from trainer.pipelines.ray_run import group_stages
from trainer.pipelines.records import Candidate, DroppedError, unpack_mask
from trainer.pipelines.roles import ServiceError
from trainer.pipelines.stages import set_mask
from trainer.pipelines.subject import subject_stages
from trainer.vision_models import Clip, weights_digest


def _noise(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def _disc(size: tuple[int, int] = (96, 80)) -> tuple[Image.Image, np.ndarray]:
    """A red disc on a green ground with a little noise, and its mask."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    mask = (rows - 40) ** 2 + (columns - 50) ** 2 < 22**2
    pixels = np.where(mask[..., None], (200, 30, 40), (40, 160, 60)) + np.random.default_rng(0).integers(
        0, 9, (1, 1, 3)
    )
    return Image.fromarray(pixels.astype(np.uint8)), mask


def _roles(roles: dict[str, Any]) -> tuple[PipelineConfig, Roles]:
    config = check_json(PipelineConfig, {"pipeline": {"name": "edit"}, "roles": roles}, "config")
    return config, Roles(config)


# --- OpenCV ---


def test_grabcut_finds_the_disc_in_its_box_every_time_the_same() -> None:
    image, mask = _disc()
    cut = GrabCut(5).segment(image, (24.0, 14.0, 78.0, 66.0))
    assert iou(cut, mask) > 0.95
    assert (GrabCut(5).segment(image, (24.0, 14.0, 78.0, 66.0)) == cut).all()
    for box in ((0.0, 0.0, 96.0, 80.0), (10.0, 10.0, 10.2, 40.0)):
        assert not GrabCut(5).segment(image, box).any()


def test_telea_fills_the_hole_with_what_is_around_it() -> None:
    image, mask = _disc()
    hole = dilate(mask, 3)
    assert hole.sum() > mask.sum() and (hole | mask).sum() == hole.sum()
    assert dilate(mask, 0).sum() == mask.sum()
    filled = np.asarray(Telea(5).inpaint(image, hole)).astype(int)
    ground = np.asarray(image).astype(int)[0, 0]
    assert np.abs(filled[hole] - ground).max() < 12
    assert (filled[~hole] == np.asarray(image)[~hole]).all()


# --- LaMa ---


class _Grey(torch.nn.Module):
    """Fills holes with a grey that depends on the size that it was given."""

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert image.shape[2] % 8 == 0 and image.shape[3] % 8 == 0
        return image * 0 + 0.5 * mask


@pytest.fixture
def lama_file(tmp_path: Path) -> Path:
    torch.jit.script(_Grey()).save(tmp_path / "big-lama.pt")
    return tmp_path / "big-lama.pt"


def test_lama_changes_the_hole_alone(lama_file: Path) -> None:
    image, mask = _noise(1, (61, 43)), np.zeros((43, 61), bool)
    mask[10:30, 20:50] = True
    lama = Lama(LamaRole(loader="lama", file=str(lama_file), trust_torchscript=True))
    filled = np.asarray(lama.inpaint(image, mask))
    assert filled.shape == (43, 61, 3) and (filled[mask] == 128).all()
    assert (filled[~mask] == np.asarray(image)[~mask]).all()


def test_a_torchscript_file_is_run_only_where_it_is_trusted(lama_file: Path, tmp_path: Path) -> None:
    role = {"loader": "lama", "file": str(lama_file)}
    config, roles = _roles({"inpainter": role})
    for attempt in (lambda: roles.inpainter, lambda: identities(config)):
        with pytest.raises(InputError, match=r"TorchScript, a program that would run .* trust_torchscript: true"):
            attempt()
    config, _ = _roles({"inpainter": {**role, "trust_torchscript": True}})
    digest = identities(config)["inpainter"]["file"]
    assert len(digest) == 64
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"junk.pt is no TorchScript file"):
        Lama(LamaRole(loader="lama", file=str(tmp_path / "junk.pt"), trust_torchscript=True))


# --- CLIP and LAION's head ---


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks") / "clip"
    save_clip(folder)
    return folder


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_aesthetic_score_is_the_heads_on_clips_vector(
    depth: int, suffix: str, clip_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    widths = [8, 1] if depth == 1 else [8, 6, 4, 1]
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    numbers = ["layers.0.", "layers.2.", "layers.10."] if depth == 3 else [""]  # LAION's count the dropout between
    tensors = {
        f"{prefix}{name}": value
        for prefix, layer in zip(numbers, layers, strict=True)
        for name, value in layer.state_dict().items()
    }
    head = tmp_path / f"head{suffix}"
    save_file(tensors, head) if suffix == ".safetensors" else torch.save(tensors, head)
    config, roles = _roles({"aesthetic": {"loader": "laion", "head": str(head), "model": str(clip_folder)}})
    values = torch.from_numpy(Clip(clip_folder, "clip", "cpu").embed_images([_noise(2)]))
    for layer in layers:
        values = layer(values)
    assert roles.aesthetic.score(_noise(2)) == pytest.approx(float(values.detach()), abs=1e-5)
    assert identities(config)["aesthetic"]["weights"] == weights_digest(clip_folder)


def test_heads_that_are_none_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "other.pth")
    role = {"loader": "laion", "head": str(tmp_path / "other.pth"), "model": str(clip_folder)}
    with pytest.raises(InputError, match="vectors of 768 numbers, and those of this CLIP have 8"):
        _ = _roles({"aesthetic": role})[1].aesthetic
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a.pth is no aesthetic head: it holds a"):
        load_head(tmp_path / "a.pth")
    torch.save(_Grey(), tmp_path / "code.pth")  # would run code where it is loaded
    with pytest.raises(InputError, match=r"code.pth cannot be read as weights"):
        load_head(tmp_path / "code.pth")


def test_networks_are_opened_by_their_names_in_the_config(clip_folder: Path, tmp_path: Path) -> None:
    save_detector(tmp_path / "detector")
    save_segmenter(tmp_path / "segmenter")
    roles: dict[str, Any] = {
        "detector": {"loader": "grounding-dino", "model": str(tmp_path / "detector"), "box_threshold": 0.0},
        "segmenter": {"loader": "sam", "model": str(tmp_path / "segmenter")},
        "clip": {"loader": "clip", "model": str(clip_folder)},
    }
    config, opened = _roles(roles)
    detections = opened.detector.detect(_noise(4), "A signboard")
    scores = [detection.score for detection in detections]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True)
    mask = opened.segmenter.segment(_noise(4), detections[0].box)
    assert mask.shape == (80, 96) and mask.dtype == bool
    clip = Clip(clip_folder, "clip", "cpu")
    expected = clip.embed_images([_noise(4)])[0] @ clip.embed_texts(["a car"])[0]
    assert opened.clip.similarity(_noise(4), "a car") == pytest.approx(float(expected))
    assert identities(config)["detector"]["box_threshold"] == 0
    roles["detector"] |= {"box_threshold": 1.0, "device": "cpu", "concurrency": 3}
    other, opened = _roles(roles)
    assert opened.detector.detect(_noise(4), "A signboard") == []
    assert identities(other)["segmenter"] == identities(config)["segmenter"] != identities(config)["detector"]
    config, _ = _roles({"clip": {"loader": "clip", "model": "nobody/no-such-model"}})
    with pytest.raises(InputError, match="get it by: hf download nobody/no-such-model"):
        identities(config)


# --- language models by transformers ---

TEMPLATE = (
    "{% for m in messages %}a {% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|image_pad|>{% else %} {{ c.text }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
)
TEXT_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "initializer_range": 1.0,
}


def _save_chat_tokenizer(folder: Path) -> int:
    from transformers import AutoTokenizer

    save_tokenizer(folder, ("<pad>", "<unk>", "<bos>", "<eos>"), "<bos> $A <eos>")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_a_text_model_answers_with_its_likeliest_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path / "qwen2"
    _save_chat_tokenizer(folder)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**TEXT_SIZES)).save_pretrained(folder)
    chat = TransformersChat(TransformersRole(loader="transformers", model=str(folder), precision="fp32"))
    answer = chat.ask(Question(text="dog in the jungle", max_tokens=6))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = Qwen2ForCausalLM.from_pretrained(folder)
    tokens: list[int] = tokenizer("a dog in the jungle ", add_special_tokens=False)["input_ids"]
    start = len(tokens)
    with torch.inference_mode():
        while len(tokens) < start + 6 and tokens[-1] != 3:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert answer == tokenizer.decode(tokens[start:], skip_special_tokens=True) != ""
    with pytest.raises(ServiceError, match="sees no images; name a vision-language model"):
        chat.ask(Question(text="a", image=_noise(0)))


def test_a_vision_model_sees_the_image(tmp_path: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = tmp_path / "qwen2-vl"
    image_token = _save_chat_tokenizer(folder)
    vision: dict[str, Any] = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    config = Qwen2VLConfig(
        text_config={**TEXT_SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={**vision, "mlp_ratio": 2, "initializer_range": 1.0},
        image_token_id=image_token,
        video_token_id=30,
        vision_start_token_id=28,
        vision_end_token_id=29,
    )
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    size = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    Qwen2VLImageProcessorPil(patch_size=4, size=size).save_pretrained(folder)
    chat = TransformersChat(TransformersRole(loader="transformers", model=str(folder), precision="fp32"))
    images = [Image.new("RGB", (40, 24), color) for color in ("black", "red", "white")]
    answers = [chat.ask(Question(text="the dog", image=image, max_tokens=8)) for image in images]
    assert len(set(answers)) > 1 and all(isinstance(answer, str) for answer in answers)
    assert chat.ask(Question(text="the dog", image=images[0], max_tokens=8)) == answers[0]
    assert isinstance(chat.ask(Question(text="the dog", max_tokens=2)), str)


# --- prompts and placement ---


def test_own_prompts_replace_those_that_come_with_the_pipelines(tmp_path: Path) -> None:
    (tmp_path / "entities.txt").write_text("Things in $caption, for $$5?\n")
    prompts = Prompts(str(tmp_path))
    assert prompts.fill("entities", caption="a $name") == "Things in a $name, for $5?"
    assert prompts.text("name") == (PROMPTS / "name.txt").read_text().rstrip("\n")
    (tmp_path / "entities.txt").write_text("Things in $captoin")
    with pytest.raises(InputError, match=r"entities.txt has a place that nothing fills \('captoin'\); known are \$cap"):
        Prompts(str(tmp_path)).fill("entities", caption="a")
    with pytest.raises(InputError, match="which is no folder"):
        Prompts(str(tmp_path / "none"))


def test_roles_without_a_gpu_share_actors_and_the_others_have_their_own() -> None:
    roles = check_json(
        RoleConfigs,
        {
            "describer": {"loader": "openai", "model": "m", "concurrency": 8},
            "inpainter": {"loader": "telea", "concurrency": 8},
            "aesthetic": {"loader": "laion", "head": "h", "num_gpus": 0.5},
        },
        "roles",
    )
    config = check_json(PipelineConfig, {"pipeline": {"name": "add"}}, "config").model_copy(update={"roles": roles})
    groups = group_stages(config, add_stages(config))
    assert [([stage.name for stage in group.stages], group.concurrency, group.num_gpus) for group in groups] == [
        (["read", "aesthetic", "masks"], 1, 0.5),
        (["complete", "name", "inpaint", "instruct", "write"], 8, 0.0),
    ]


def test_roles_that_need_equal_parts_of_a_gpu_have_their_own_actors() -> None:
    gpu = {"num_gpus": 0.25, "concurrency": 2}
    roles = {"detector": {"loader": "grounding-dino", **gpu}, "segmenter": {"loader": "sam", **gpu}}
    content = {"pipeline": {"name": "subject"}, "roles": {"tagger": {"loader": "openai", "model": "m"}, **roles}}
    config = check_json(PipelineConfig, content, "config")
    groups = group_stages(config, subject_stages(config))
    names = [[stage.name for stage in group.stages] for group in groups]
    assert names == [["read", "tag"], ["detect"], ["segment", "write"]]


def test_a_mask_of_another_size_and_an_empty_one_are_left_out() -> None:
    candidate, mask = Candidate("cat"), np.ones((4, 6), bool)
    set_mask(candidate, mask, (6, 4))
    assert (unpack_mask(candidate.mask) == mask).all()
    with pytest.raises(DroppedError, match="a mask of another size than the image"):
        set_mask(candidate, mask, (4, 6))
    with pytest.raises(DroppedError, match="an empty mask"):
        set_mask(candidate, ~mask, (6, 4))
