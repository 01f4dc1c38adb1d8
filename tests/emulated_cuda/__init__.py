"""An emulated CUDA device, so that what runs on a GPU is tested where there is none.

    torch.cuda.*  ─────────►  device.py        streams, events, memory statistics, one generator per device
    aten::* on "cuda" ─────►  csrc/            the CPU's kernels on the same memory, in the empty CUDA dispatch key
    nccl  ─────────────────►  collectives.py   gloo, with what NCCL refuses

What a GPU is strict about, this device is strict about: tensors of different devices and generators of the CPU are
refused; fresh memory is NaN; copies from and to pinned memory that nobody waits for are carried out as late as the
rules allow; a race detector looks at kernels, copies and freed blocks of all streams; and it is counted, per line of
code, where the host waits for the device. Unmodified commands run on it.

It does not show what a GPU computes: rounding, the choice of kernels, their speed. See `docs/gpu.md`.

The emulation changes `torch` for a whole process, and for good: tests run it in processes of their own. By hand, from
the root of the repository:

    EMULATED_CUDA_DEVICES=1 PYTHONPATH=tests/emulated_cuda/autostart lvlm-prune prune --trainer.accelerator cuda ...

Each device has `EMULATED_CUDA_GB` of memory, 24 by default. `EMULATED_CUDA_REPORT` names a file that gets the notes of
the process when it ends: kernels, host waits, races.
"""
