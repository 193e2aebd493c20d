"""What the devices do while a network trains: utilisation, memory and power, phase by phase.

python docs/examples/profile_training.py
"""

import torch
from rich.console import Console

import alexnet_kernels as ak
from alexnet_kernels.profiling import GpuMonitor


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = ak.models.alexnet("tiny", num_classes=10).to(device)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    images, labels = torch.randn(8, 3, 227, 227, device=device) * 60, torch.randint(10, (8,), device=device)

    with GpuMonitor() as monitor:
        for _ in range(5):
            with monitor.phase("forward"):
                loss = torch.nn.functional.cross_entropy(net(images), labels)
            with monitor.phase("backward"):
                optimiser.zero_grad()
                loss.backward()
            with monitor.phase("update"):
                optimiser.step()
    Console().print(monitor.summary())


if __name__ == "__main__":
    main()
