"""The emulated device is as strict as a GPU: what would be wrong there is refused, or noticed, here."""

from __future__ import annotations

import pytest
import torch

from tests.emulated_cuda.building import load

pytestmark = pytest.mark.emulated_gpu

LARGE = 2**17


def _report() -> dict:
    return load().report()


def _fresh_start() -> None:
    torch.cuda.synchronize()
    load().forget()


# ---- what a GPU refuses ----------------------------------------------------------------------------------------------
def mixed_devices():
    torch.ones(2, device="cuda") + torch.ones(2)


def mixed_devices_in_a_list():
    torch.cat([torch.ones(2, device="cuda"), torch.ones(2)])


def write_into_another_device():
    torch.mm(torch.ones(2, 2), torch.ones(2, 2), out=torch.ones(2, 2, device="cuda"))


def generator_of_the_cpu():
    torch.randn(2, device="cuda", generator=torch.Generator())


def numpy_of_device_memory():
    torch.ones(2, device="cuda").numpy()


def pinned_device_memory():
    torch.empty(2, device="cuda", pin_memory=True)


def a_device_that_is_not_there():
    torch.empty(2, device="cuda:7")


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (mixed_devices, "at least two devices"),
        (mixed_devices_in_a_list, "at least two devices"),
        (write_into_another_device, "at least two devices"),
        (generator_of_the_cpu, "Expected a 'cuda' device type for generator"),
        (numpy_of_device_memory, "Use Tensor.cpu"),
        (pinned_device_memory, "Only dense CPU tensors can be pinned"),
        (a_device_that_is_not_there, "invalid device ordinal"),
    ],
)
def test_what_a_gpu_refuses_is_refused(on_device, mistake, said):
    with pytest.raises((RuntimeError, TypeError), match=said):
        on_device(mistake)


# ---- memory ----------------------------------------------------------------------------------------------------------
def fresh_memory() -> tuple[bool, bool]:
    made = torch.empty(1000, device="cuda"), torch.empty(1000, dtype=torch.bfloat16, device="cuda")
    return tuple(bool(one.isnan().all()) for one in made)


def test_fresh_memory_is_not_a_number(on_device):
    assert on_device(fresh_memory) == (True, True)


def counted_memory() -> list[int]:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept, gone = torch.empty(LARGE, device="cuda"), torch.empty(LARGE, device="cuda")
    held, free = torch.cuda.memory_allocated() - before, torch.cuda.mem_get_info()[0]
    del gone
    after = torch.cuda.memory_allocated() - before
    cached = torch.cuda.mem_get_info()[0] - free
    torch.cuda.empty_cache()
    given_back = torch.cuda.mem_get_info()[0] - free
    del kept
    return [held, after, torch.cuda.max_memory_allocated() - before, cached, given_back]


def test_memory_is_counted_and_cached_as_on_a_gpu(on_device):
    size = 4 * LARGE
    assert on_device(counted_memory) == [2 * size, size, 2 * size, 0, size]


# ---- copies and streams ----------------------------------------------------------------------------------------------
def copy_that_nobody_waits_for() -> tuple[bool, bool]:
    kept = torch.empty(LARGE, pin_memory=True)
    source = torch.arange(float(LARGE), device="cuda")
    kept.copy_(source, non_blocking=True)
    at_once = bool(kept[-1] == LARGE - 1)
    torch.cuda.current_stream().synchronize()
    return at_once, bool(kept[-1] == LARGE - 1)


def test_a_copy_to_pinned_memory_arrives_when_it_was_waited_for(on_device):
    assert on_device(copy_that_nobody_waits_for) == (False, True)


def two_streams(wait: bool, record: bool) -> list[str]:
    """Memory of the default stream, changed on another stream and freed."""
    _fresh_start()
    other, values = torch.cuda.Stream(), torch.zeros(LARGE, device="cuda")
    ready = torch.cuda.current_stream().record_event()
    with torch.cuda.stream(other):
        if wait:
            other.wait_event(ready)
        values += 1
    if record:
        values.record_stream(other)
    del values
    races = list(_report()["races"])
    torch.cuda.synchronize()
    return races


def test_work_on_two_streams_is_to_be_ordered(on_device):
    assert on_device(two_streams, wait=True, record=True) == []
    assert any("write after write" in race for race in on_device(two_streams, wait=False, record=True))
    assert any("without record_stream" in race for race in on_device(two_streams, wait=True, record=False))


def pinned_memory_used_again(wait: bool) -> list[str]:
    _fresh_start()
    staging, target = torch.zeros(LARGE, pin_memory=True), torch.empty(LARGE, device="cuda")
    target.copy_(staging, non_blocking=True)
    arrived = torch.cuda.current_stream().record_event()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        if wait:
            other.wait_event(arrived)
        staging.copy_(torch.ones(LARGE, device="cuda"), non_blocking=True)
    races = list(_report()["races"])
    torch.cuda.synchronize()
    return races


def test_pinned_memory_is_watched_too(on_device):
    assert on_device(pinned_memory_used_again, wait=True) == []
    assert any("pinned memory" in race for race in on_device(pinned_memory_used_again, wait=False))


# ---- host waits ------------------------------------------------------------------------------------------------------
def waits() -> dict[str, int]:
    values, mask = torch.arange(4.0, device="cuda"), torch.tensor([True, False, True, False]).cuda()
    index = torch.tensor([0, 2]).pin_memory()
    _fresh_start()
    counts = {}
    for name, work in {
        "arithmetic": lambda: (values + 1).sum(),
        "selection by an index": lambda: values[values.topk(2).indices],
        "where": lambda: values.where(mask, 0.0),
        "pinned copy": lambda: index.to("cuda", non_blocking=True),
        "item": lambda: values.sum().item(),
        "tolist": lambda: values.tolist(),
        "truth": lambda: bool(mask.any()),
        "nonzero": lambda: mask.nonzero(),
        "selection by a mask": lambda: values[mask],
        "tensor of a list": lambda: torch.tensor([1, 2], device="cuda"),
        "to the host": lambda: values.cpu(),
        "synchronize": lambda: torch.cuda.synchronize(),
    }.items():
        before = sum(_report()["waits"].values())
        work()
        counts[name] = sum(_report()["waits"].values()) - before
    return counts


def test_host_waits_are_counted_where_a_gpu_has_them(on_device):
    found = on_device(waits)
    free = {"arithmetic", "selection by an index", "where", "pinned copy"}
    assert {name for name, count in found.items() if count == 0} == free
    assert found["item"] == found["nonzero"] == found["selection by a mask"] == found["synchronize"] == 1


# ---- the same numbers as on the CPU ----------------------------------------------------------------------------------
def results(where: str) -> list[torch.Tensor]:
    generator = torch.Generator(where).manual_seed(3)
    one = torch.randn(6, 8, generator=generator, device=where)
    weight = torch.nn.Parameter(one[:4].clone())
    (one @ weight.T).tanh().square().sum().backward()
    view = one.t()[1:3]
    view.mul_(0)
    found = [one, view, weight.grad, one.kthvalue(2, dim=1).values, one.sort(dim=1).indices, one[one > 0]]
    found += [torch.nn.functional.scaled_dot_product_attention(*[one[None, None]] * 3, is_causal=True)]
    found += [torch.linalg.cholesky(one.double() @ one.double().T + torch.eye(6, device=where))]
    found += [torch.conv2d(one.reshape(1, 3, 4, 4), one[:4, :3].reshape(4, 3, 1, 1)), one.bfloat16().cumsum(1)]
    assert all(value.device.type == where for value in found)
    return [value.detach().cpu() for value in found]


def test_numbers_are_those_of_the_cpu(on_device):
    for on_cpu, on_gpu in zip(on_device(results, "cpu"), on_device(results, "cuda"), strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=0)


# ---- a mistake of this kind in this project --------------------------------------------------------------------------
def sum_without_the_tokens_device() -> None:
    """A statistic that keeps its sums on the CPU, whatever device its tokens are on."""
    from lvlm_prune.methods import statistics

    forgetful = statistics.ChannelNorm(4)
    forgetful.add(torch.ones(3, 4, device="cuda"), torch.ones(3, device="cuda"))


def test_a_statistic_that_forgets_its_device_is_caught(on_device):
    with pytest.raises(RuntimeError, match="at least two devices"):
        on_device(sum_without_the_tokens_device)


def attention_with_a_mask(where: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of attention under a mask that hides a part, as padding does."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, 10, 16, generator=generator).to(where).requires_grad_() for _ in range(3)]
    visible = torch.ones(10, 10, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    visible[1, :, 3:, :3] = False
    mask = visible if dtype == torch.bool else torch.zeros(visible.shape).masked_fill(~visible, -1e9)
    found = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask.to(where))
    found.square().sum().backward()
    return [found.detach().cpu(), *(one.grad.cpu() for one in inputs)]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_attention_that_is_trained_heeds_its_mask(dtype, on_device):
    torch.testing.assert_close(on_device(attention_with_a_mask, "cuda", dtype), attention_with_a_mask("cpu", dtype))
