import copy

import pytest
import torch
from torch import nn

from ldm.training.ema import EMA, PowerEMA
from ldm.weights.posthoc import exponent


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def move(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        network.norm.running_mean.copy_(torch.randn(2, generator=generator))
        network.count += 1


def test_the_average_is_that_of_the_definition():
    network = Net()
    ema = EMA(network, decay=0.9)
    expected = {name: p.detach().double() for name, p in copy.deepcopy(network).named_parameters()}
    for n in range(1, 200):
        move(network, n)
        ema.update(network)
        decay = min(0.9, (1 + n) / (10 + n))
        for name, parameter in network.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    for name, parameter in ema.average.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-4, atol=1e-4)
    assert torch.equal(ema.average.norm.running_mean, network.norm.running_mean) and ema.average.count == 199


def test_warm_up_forgets_the_start():
    """After few updates the average is near the weights, whatever the decay."""
    network = Net()
    with torch.no_grad():
        network.linear.weight.fill_(100.0)
    ema = EMA(network, decay=0.9999)
    with torch.no_grad():
        network.linear.weight.fill_(1.0)
    for _ in range(20):
        ema.update(network)
    assert ema.average.linear.weight.max() < 1.01


def test_a_decay_of_zero_is_a_copy():
    network = Net()
    ema = EMA(network, decay=0.0)
    move(network, 1)
    ema.update(network)
    assert all(torch.equal(a, b) for a, b in zip(ema.average.parameters(), network.parameters(), strict=True))


def test_it_is_a_copy_that_nothing_trains():
    network = Net()
    ema = EMA(network, decay=0.9)
    assert not any(p.requires_grad for p in ema.parameters())
    assert not {id(p) for p in ema.parameters()} & {id(p) for p in network.parameters()}
    assert all(p.requires_grad for p in network.parameters())
    assert not ema.train().average.training and not ema.average.training


def test_the_state_goes_on_where_it_was():
    networks = [Net(), Net()]
    first = EMA(networks[0], decay=0.99)
    for n in range(7):
        move(networks[0], n)
        first.update(networks[0])
    state = copy.deepcopy(first.state_dict())
    networks[1].load_state_dict(networks[0].state_dict())
    second = EMA(networks[1], decay=0.99)
    second.load_state_dict(state)
    for n in range(7, 12):
        for network, ema in zip(networks, (first, second), strict=True):
            move(network, n)
            ema.update(network)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert int(second.num_updates) == 12


def test_the_weights_are_only_read():
    network = Net()
    before = copy.deepcopy(network.state_dict())
    ema = EMA(network, decay=0.5)
    ema.update(network)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_format_makes_no_difference(memory_format):
    network = nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
    ema = EMA(network, decay=0.5)
    old = network.weight.detach().clone()
    with torch.no_grad():
        network.weight.add_(1.0)
    ema.update(network)
    torch.testing.assert_close(ema.average.weight, old + 9 / 11)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_a_power_average_weighs_every_step_as_its_profile_does(length):
    """EDM2's integral over weights that stand from step to step, by the definition."""
    network = Net()
    ema, seen = PowerEMA(network, length), []
    for n in range(120):
        move(network, n)
        ema.update(network)
        seen.append(network.linear.weight.detach().double().clone())
    gamma = exponent(length)
    ends = (torch.arange(121) / 120).double() ** (gamma + 1)
    expected = (ends.diff()[:, None, None] * torch.stack(seen)).sum(0)
    torch.testing.assert_close(ema.average.linear.weight.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ema.average.norm.running_mean, network.norm.running_mean)


def test_a_power_average_forgets_the_start_at_once():
    network = Net()
    ema = PowerEMA(network, 0.1)
    move(network, 1)
    ema.update(network)
    assert all(torch.equal(a, b) for a, b in zip(ema.average.parameters(), network.parameters(), strict=True))
