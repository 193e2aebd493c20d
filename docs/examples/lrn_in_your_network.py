"""Response normalisation in a network of your own: the drop-in module, both conventions of alpha, and what would run.

python docs/examples/lrn_in_your_network.py
"""

import time

import torch

import alexnet_kernels as ak


def network(norm: type[torch.nn.LocalResponseNorm]) -> torch.nn.Sequential:
    """A small stem with the norm in the middle; the class is all that differs."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 96, 11, stride=4),
        torch.nn.ReLU(),
        norm(5, alpha=5e-4, k=2.0),  # 5e-4 / 5 = 1e-4: the paper's coefficient in torch's convention
        torch.nn.MaxPool2d(3, 2),
    )


def main() -> None:
    torch.manual_seed(0)
    stock, ours = network(torch.nn.LocalResponseNorm), network(ak.nn.LocalResponseNorm)
    ours.load_state_dict(stock.state_dict())  # a norm has no weights: the keys are the same
    images = torch.randn(8, 3, 227, 227) * 60
    for name, net in (("torch.nn", stock), ("alexnet_kernels", ours)):
        net(images).sum().backward()
        began = time.perf_counter()
        net(images).sum().backward()
        print(f"{name:16} {1e3 * (time.perf_counter() - began):7.1f} ms forward and backward")
    print("largest difference:", (stock(images) - ours(images)).abs().max().item())

    paper = ak.functional.local_response_norm(images, 5, alpha=1e-4, k=2.0, alpha_mode="sum")
    torch_convention = ak.functional.local_response_norm(images, 5, alpha=5e-4, k=2.0)
    print("the paper's formula is torch's with alpha times size:", torch.equal(paper, torch_convention))

    print(ak.explain("local_response_norm", images, 5))


if __name__ == "__main__":
    main()
