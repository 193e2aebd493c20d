"""A faster LPIPS: convert the perceptual metric in place; its keys, values and gradients stay.

    python docs/examples/faster_lpips.py

Uses the ``lpips`` package where it is installed, and otherwise a metric of the same shape on torchvision's AlexNet.
"""

import time

import torch
import torchvision

import alexnet_kernels as ak


class AlexDistance(torch.nn.Module):
    """LPIPS in outline: five slices of AlexNet's features, unit length across channels, squared differences."""

    ENDS = (2, 5, 8, 10, 12)

    def __init__(self) -> None:
        super().__init__()
        features = torchvision.models.alexnet(weights=None).features
        begins = (0, *self.ENDS[:-1])
        self.slices = torch.nn.ModuleList(features[a:b] for a, b in zip(begins, self.ENDS, strict=True))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = a.new_zeros(len(a))
        for part in self.slices:
            a, b = part(a), part(b)
            unit = [t / (t.norm(dim=1, keepdim=True) + 1e-10) for t in (a, b)]
            total = total + (unit[0] - unit[1]).square().sum(1).mean((1, 2))
        return total


def metric() -> torch.nn.Module:
    try:
        import lpips
    except ImportError:
        return AlexDistance()
    return lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)


def milliseconds(net: torch.nn.Module, a: torch.Tensor, b: torch.Tensor) -> float:
    net(a, b)
    began = time.perf_counter()
    for _ in range(5):
        net(a, b).sum().backward()
    return 1e3 * (time.perf_counter() - began) / 5


def main() -> None:
    torch.manual_seed(0)
    net = metric().eval()
    a, b = torch.rand(2, 4, 3, 96, 96).unbind()
    a.requires_grad_()
    before, took = net(a, b).detach(), milliseconds(net, a, b)

    ak.convert(net)  # in place: the same module, the same parameters, the same keys
    print(ak.conversion_report(net))
    after, takes = net(a, b).detach(), milliseconds(net, a, b)

    print(f"{took:.1f} ms before, {takes:.1f} ms after; largest difference {(after - before).abs().max().item():.1e}")
    ak.revert(net)


if __name__ == "__main__":
    main()
