"""What the header of a run says of its surroundings."""

from hpcmlp.run.record import KERNEL_VARIABLES, _kernels


def test_what_chooses_kernels_for_openblas_is_named(monkeypatch):
    for name in KERNEL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert _kernels() == ""
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert _kernels() == ", OPENBLAS_CORETYPE=Haswell"
