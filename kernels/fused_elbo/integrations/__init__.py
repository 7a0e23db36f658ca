"""One line that puts the kernels under code written for another library.

Nothing is patched at import. Each module names the line to add, and where it replaces something of
another library it has `apply`, `undo` and the context manager `applied`:

    from fused_elbo.integrations import diffusers

    diffusers.apply()

====================  =============================================================
`diffusers`           the posterior of AutoencoderKL and of those that share its class
`distributions`       `torch.distributions`: KL of Normals, `FusedNormal`
`pyro`                the same for Pyro, and so for `TraceMeanField_ELBO`
`pythae`              sampling and losses of the VAE family
`ldm`                 latent-diffusion and generative-models: posterior and regularizer
`vdvae`               the log-std functions of VDVAE
`torch_functional`    `torch.nn.functional.gaussian_nll_loss`
`vits`                the masked `kl_loss` of VITS
`pytest_plugin`       one of them applied to the tests of another project
====================  =============================================================
"""
