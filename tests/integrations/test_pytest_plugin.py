"""The pytest plugin that runs somebody else's tests with an integration applied."""

import sys

import pytest
from torch.distributions import Normal
from torch.distributions.kl import _KL_REGISTRY as registry

pytest_plugins = ["pytester"]

PLUGIN = ("-p", "fused_elbo.integrations.pytest_plugin", "-p", "no:cacheprovider")
RULE = """
    from torch.distributions import Normal
    from torch.distributions.kl import _KL_REGISTRY as registry

    def test_the_rule_is_the_one_of_this_package():
        assert registry[Normal, Normal].__module__ == "fused_elbo.integrations.distributions"
"""


def test_an_integration_is_applied_for_the_length_of_the_run(pytester):
    before = registry[Normal, Normal]
    pytester.makepyfile(RULE)
    result = pytester.runpytest_inprocess(*PLUGIN, "--fused-elbo=distributions")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines("fused-elbo: distributions applied")
    assert registry[Normal, Normal] is before
    pytester.runpytest_inprocess(*PLUGIN).assert_outcomes(failed=1)


def test_it_is_applied_before_tests_are_collected(pytester):
    pytester.makepyfile(
        """
        from torch.distributions import Normal
        from torch.distributions.kl import _KL_REGISTRY as registry

        RULE = registry[Normal, Normal]

        def test_the_rule_that_was_there_at_import():
            assert RULE.__module__ == "fused_elbo.integrations.distributions"
        """
    )
    result = pytester.runpytest_inprocess(*PLUGIN, "--fused-elbo=distributions")
    result.assert_outcomes(passed=1)


def test_the_noise_can_be_the_library_s_own(pytester):
    # Here already: pytester forgets what a run imports, and numpy cannot be imported twice.
    pytest.importorskip("pythae.models", reason="the peer pythae is not installed")
    pytester.makepyfile(
        """
        import torch
        from pythae.models import VAE

        def test_samples_are_those_of_torch_randn():
            mu = torch.zeros(2, 3)
            torch.manual_seed(0)
            eps = VAE._sample_gauss(None, mu, mu + 1)[1]
            torch.manual_seed(0)
            assert torch.equal(eps, torch.randn(2, 3))
        """
    )
    fused = pytester.runpytest_inprocess(*PLUGIN, "--fused-elbo=pythae")
    fused.assert_outcomes(failed=1)
    upstream = ("--fused-elbo=pythae", "--fused-elbo-noise=upstream")
    pytester.runpytest_inprocess(*PLUGIN, *upstream).assert_outcomes(passed=1)


def test_a_library_that_is_missing_is_one_clear_error(pytester, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.vae", None)
    result = pytester.runpytest_inprocess(*PLUGIN, "--fused-elbo=diffusers")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*needs diffusers, and importing*pip install diffusers*")


def test_an_unknown_integration_is_refused(pytester):
    result = pytester.runpytest_inprocess(*PLUGIN, "--fused-elbo=numpyro")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*--fused-elbo*invalid choice: 'numpyro'*")
