"""AlexNet on two devices: train a step, see what crossed between the towers, and put the weights back on one device.

python docs/examples/two_devices.py            two CPUs, or the GPUs that are there
"""

import torch

import alexnet_kernels as ak
from alexnet_kernels.distributed.exchange import recording


def main() -> None:
    count = torch.cuda.device_count()
    devices = ("cuda:0", "cuda:1") if count > 1 else ("cuda:0", "cuda:0") if count else ("cpu", "cpu")
    torch.manual_seed(0)
    net = ak.models.TwoDeviceAlexNet("tiny", num_classes=10, devices=devices)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(4, 3, 227, 227) * 60, torch.randint(10, (4,))

    with recording() as log:
        logits = net(images)  # on the first device
    torch.nn.functional.cross_entropy(logits, labels.to(logits.device)).backward()
    optimiser.step()

    print("towers on", *map(str, net.devices))
    for transfer in log.transfers:
        way = "backward" if transfer.backward else "forward"
        print(
            f"{way:8} before {transfer.layer:5} tower {transfer.source} -> {transfer.target}: {transfer.bytes:,} bytes"
        )

    one = net.to_one_device("cpu").eval()
    with torch.no_grad():
        difference = (one(images) - net.eval()(images).cpu()).abs().max().item()
    print(f"one device and two differ by {difference:.1e}")


if __name__ == "__main__":
    main()
