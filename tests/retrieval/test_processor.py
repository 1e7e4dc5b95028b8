"""The maker of a processor is read where it decides between kernels."""

import pytest
import torch

from graft.retrieval import processor


@pytest.mark.parametrize(
    ("capability", "listed", "maker"),
    [
        ("AVX2", "vendor_id\t: AuthenticAMD\n", None),
        ("AVX512", "processor\t: 0\nvendor_id\t: AuthenticAMD\n", "AMD"),
        ("AVX512", "processor\t: 0\nvendor_id\t: GenuineIntel\n", "Intel"),
        ("AVX512", None, "Intel"),
    ],
)
def test_who_made_the_processor_is_read_where_it_has_avx512(capability, listed, maker, monkeypatch, tmp_path):
    if listed is not None:
        (tmp_path / "cpuinfo").write_text(listed)
    monkeypatch.setattr(processor, "PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert processor._avx512_maker() == maker
