"""One operation, forward and backward, on every backend that can run, against the reference.

Arguments name backends that must be among them; cpu always must.
"""

import sys

import torch

import fused_elbo
from fused_elbo import backends

required = {"cpu", "reference", *sys.argv[1:]}
ran = set()
for name, reason in backends.status():
    if reason is not None:
        print(f"{name}: cannot run: {reason}")
        continue
    device = "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    mean, logvar = (torch.randn(6, 40, generator=generator).to(device) for _ in range(2))
    results = []
    for backend in (name, "reference"):
        inputs = [mean.clone().requires_grad_(), logvar.clone().requires_grad_()]
        z, kl = fused_elbo.reparameterize_kl(*inputs, key=fused_elbo.NoiseKey(7), backend=backend)
        results.append((z, kl, *torch.autograd.grad(z.sum() + kl.sum(), inputs)))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    print(f"{name}: agrees with the reference on {device}")
    ran.add(name)
if required - ran:
    sys.exit(f"cannot run: {', '.join(sorted(required - ran))}")
print(f"fused_elbo {fused_elbo.__version__} from {fused_elbo.__file__}")
