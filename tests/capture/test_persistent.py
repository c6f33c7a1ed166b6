import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from diffusers_repr.capture import PersistentCapture, capture, capture_attention
from diffusers_repr.capture.persistent import _queries_and_keys
from diffusers_repr.models import SiTTransformer2DModel
from tests.testers.hosts import before
from tests.testers.models import unet2d


def sit(**changes):
    torch.manual_seed(0)
    settings = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_classes": 3}
    model = SiTTransformer2DModel(8, 2, 2, **{**settings, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    return model.train()


X = torch.linspace(-1, 1, 256).view(2, 2, 8, 8)
INPUTS = {"timestep": torch.tensor([100.0, 700.0]), "class_labels": torch.tensor([0, 3])}


def run(model, reads):
    """Loss of the output, a layer and an attention; its gradients."""
    model.zero_grad()
    with reads.recording() as seen:
        out = model(X, **INPUTS, drop_mask=torch.zeros(2, dtype=torch.bool)).sample
    query, key = seen["blocks.0.attn"]
    logits = query @ key.transpose(-1, -2)
    (out.square().mean() + seen["blocks.1"].square().mean() + logits.square().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def persistent(model):
    return PersistentCapture(model, ["blocks.1"], ["blocks.0.attn"])


def test_it_reads_what_capture_reads():
    model = unet2d(3).eval()
    layers = ["down_blocks.1", "mid_block", "up_blocks.0.resnets.0"]
    reads, x = PersistentCapture(model, layers), torch.randn(2, 3, 16, 16)
    with reads.recording() as seen:
        model(x, 10)
    with capture(model, layers) as tape:
        model(x, 10)
    assert list(seen) == layers
    assert all(torch.equal(seen[name], tape[name]) for name in layers)
    assert all(value.requires_grad for value in seen.values())


@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm"])
def test_queries_and_keys_are_those_of_the_softmax(norm):
    model = nn.Sequential(Attention(8, heads=2, dim_head=4, kv_heads=2, qk_norm=norm))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    reads, x = PersistentCapture(model, [], ["0"]), torch.randn(2, 5, 8)
    with reads.recording() as seen:
        model(x)
    with capture_attention(model, "0", heads=None) as tape:
        model(x)
    query, key = seen["0"]
    assert torch.allclose((query @ key.transpose(-1, -2) / 2).softmax(-1), tape["0"], atol=1e-6)


def test_grouped_keys_are_repeated():
    grouped = Attention(8, heads=4, dim_head=2, kv_heads=2)
    q, k = torch.randn(1, 3, 8), torch.randn(1, 3, 4)
    query, key = _queries_and_keys(grouped, q, k)
    for head in range(4):
        assert torch.equal(query[:, head], q[..., 2 * head : 2 * head + 2])
        assert torch.equal(key[:, head], k[..., 2 * (head // 2) : 2 * (head // 2) + 2])


def test_norms_across_heads_see_all_heads():
    across = Attention(8, heads=2, dim_head=4, kv_heads=2, qk_norm="layer_norm_across_heads")
    q, k = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    query, _ = _queries_and_keys(across, q, k)
    wanted = nn.functional.layer_norm(q, (8,), eps=across.norm_q.eps)
    assert torch.allclose(query.transpose(1, 2).flatten(2), wanted, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")  # in diffusers' checkpointing
def test_checkpointing_and_compilation_change_nothing():
    torch._dynamo.reset()
    model = sit()
    wanted = run(model, persistent(model))
    for compiled, checkpointing in ((False, True), (True, False), (True, True)):
        model = sit()
        reads = persistent(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        if compiled:
            torch._dynamo.utils.counters.clear()
            model.compile(backend="eager")
        for _ in range(2):
            got = run(model, reads)
        assert all(torch.allclose(got[name], wanted[name], atol=1e-5) for name in wanted), (compiled, checkpointing)
        # one graph: the hooks are part of it; older torch lets nothing be recorded in a checkpoint of a graph
        if compiled and not (checkpointing and before("torch", "2.13")):
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
            assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_hooks_follow_modules_that_are_replaced():
    from peft import LoraConfig, inject_adapter_in_model

    model = sit()
    reads = persistent(model)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"]), model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.eval()
    with torch.no_grad(), reads.recording() as seen:
        model(X, **INPUTS)
    with capture_attention(model, "blocks.0.attn", heads=None) as tape, torch.no_grad():
        model(X, **INPUTS)
    query, key = seen["blocks.0.attn"]
    assert torch.allclose((query @ key.transpose(-1, -2) * 8**-0.5).softmax(-1), tape["blocks.0.attn"], atol=1e-6)


def test_nothing_is_recorded_outside_and_nothing_stays_after():
    model = sit()
    reads = persistent(model)
    model(X, **INPUTS)
    assert reads._found == {}
    with pytest.raises(ValueError, match="takes x_t"), reads.recording():  # noqa: PT012
        model(X, **INPUTS)
        model(X[:, :, :3], **INPUTS)
    assert reads._found == {}
    reads.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_input():
    model = sit()
    with pytest.raises(ValueError, match=r"No layer 'blocks.7'.*Closest"):
        PersistentCapture(model, ["blocks.7"])
    with pytest.raises(ValueError, match="no attention. Closest"):
        PersistentCapture(model, [], ["blocks.1"])
    reads = persistent(model)
    with (
        pytest.raises(ValueError, match=r"Never called in the forward: \['blocks.1', 'blocks.0.attn'\]"),
        reads.recording(),
    ):
        pass
    with pytest.raises(ValueError, match="ran twice"), reads.recording():  # noqa: PT012
        model(X, **INPUTS)
        model(X, **INPUTS)
    cross = nn.Sequential(Attention(8, cross_attention_dim=6, heads=2, dim_head=4))
    with pytest.raises(ValueError, match="it is a cross-attention"):
        PersistentCapture(cross, [], ["0"])
    fused = sit()
    fused.fuse_qkv_projections()
    with pytest.raises(ValueError, match="its projections are fused"):
        PersistentCapture(fused, [], ["blocks.0.attn"])
    model.compile(backend="eager")
    with pytest.raises(RuntimeError, match="Make the objective first"):
        persistent(model)
