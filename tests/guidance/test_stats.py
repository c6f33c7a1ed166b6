"""`stats.evaluations`: what was really run of the network, against FLOPs counted in the run itself."""

import pickle

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_repr import CFG, PAG, SAG, EnergyGuidance, guide
from diffusers_repr.capture import capture
from diffusers_repr.capture.flops import flops_shares, without_data
from tests.guidance.test_engine import network_of, own_scales, run
from tests.testers.guidance import noise
from tests.testers.models import build


def spent(work):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:  # of the others not all are counted
        work()
    return flops.get_total_flops()


@pytest.mark.parametrize(
    ("name", "layers"), [("ddim", "up_blocks.1.*"), ("sd", "mid_block.*"), ("sd3", "transformer_blocks.1.attn")]
)
def test_shared_lanes_count_from_where_they_join(name, layers):
    """The perturbed attention makes no scores: some percent less than the lane is counted for."""
    pipe = build(name)
    network, steps = network_of(pipe), 2

    def network_flops(guidance):
        counted = []
        forward = network.forward

        def measured(*args, **kwargs):
            out = []
            counted.append(spent(lambda: out.append(forward(*args, **kwargs))))
            return out[0]

        network.forward = measured
        try:
            handle = guide(pipe, guidance) if guidance else None
            run(name, pipe, own_scales(pipe)[0], steps=steps)
            if handle is not None:
                handle.remove()
            return sum(counted), handle
        finally:
            del network.forward

    plain, _ = network_flops(None)
    total, handle = network_flops(PAG(2.0, layers=layers))
    assert handle.stats.lanes == 2 * steps
    assert handle.stats.passes == steps
    real = steps * total / plain
    assert real <= handle.stats.evaluations <= 1.06 * real
    assert handle.stats.evaluations < 2 * steps - 0.2


def test_passes_left_early_count_up_to_where_they_were_left():
    pipe = build("ddim")
    x = noise(1, 3, 16, 16)
    layer = "mid_block"

    def read():
        with torch.no_grad(), capture(pipe.unet, layer):
            pipe.unet(x, 300)

    with torch.no_grad():
        whole = spent(lambda: pipe.unet(x, 300))
    share = spent(read) / whole
    term = EnergyGuidance(lambda features, x0, condition: features[layer].square().mean((1, 2, 3)), layers=[layer])
    with guide(pipe, [term, PAG(2.0)]) as handle:
        run("ddim", pipe, steps=3)
    joined = handle.stats.steps[0].joined
    inputs = without_data({"sample": x, "timestep": torch.tensor(300)})
    lane = 1 - flops_shares(pipe.unet, [joined], inputs)[joined][0]
    assert handle.stats.lanes == 9
    assert handle.stats.evaluations == pytest.approx(3 * (1 + share + lane))


def test_whole_passes_are_whole():
    pipe = build("short_sd")
    with guide(pipe, [SAG(0.75), CFG(3.0, interval=(0, 600))]) as handle:
        run("sd", pipe, 3.0)
    assert handle.stats.evaluations == handle.stats.lanes == 6
    inputs = {"sample": noise(1, 4, 16, 16), "timestep": torch.tensor(5), "encoder_hidden_states": noise(1, 7, 16)}
    with pytest.raises(ValueError, match=r"Never called in a forward of UNet2DConditionModel.*nowhere"):
        flops_shares(pipe.unet, ["mid_block", "nowhere"], without_data(inputs))


def test_a_pickle_has_the_numbers_and_no_network():
    pipe = build("ddim")
    with guide(pipe, PAG(2.0)) as handle:
        run("ddim", pipe)
    copy = pickle.loads(pickle.dumps(handle.stats))
    assert (copy.lanes, repr(copy.steps)) == (handle.stats.lanes, repr(handle.stats.steps))
    with pytest.raises(RuntimeError, match="network is gone"):
        _ = copy.evaluations
    assert handle.stats.evaluations < handle.stats.lanes
    assert pickle.loads(pickle.dumps(handle.stats)).evaluations == handle.stats.evaluations
