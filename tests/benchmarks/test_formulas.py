"""Each formula at one small shape, counted by hand."""

from ssast.benchmarks import formulas
from ssast.benchmarks.formulas import Need


def test_fbank():
    # 2 clips of 720 int16 samples: 3 whole frames each (400, 560, 720); 8 rows of 128 float32
    need = formulas.fbank(B=2, S=720, T=8, F=128, in_size=2, out_size=4)["forward"]
    assert need.bytes == 2 * 720 * 2 + 2 * 8 * 128 * 4
    mean, subtract, emphasis, window = 400, 400, 800, 400
    fft = 2.5 * 512 * 9
    power, mel, logarithm_and_scaling = 3 * 256, 4 * 256, 3 * 128
    assert need.flop == 2 * 3 * (mean + subtract + emphasis + window + fft + power + mel + logarithm_and_scaling)
    # frames that the output has no room for are not needed
    assert formulas.fbank(B=2, S=720, T=1, F=128, in_size=2, out_size=4)["forward"].flop * 3 == need.flop


def test_mask():
    assert formulas.mask(B=512, M=400) == {"forward": Need(512 * 400 * 8, 0)}


def test_embed():
    # 2 clips of 5 patches of 3 values, 4 of them masked, to width 7, in bytes of 2
    needs = formulas.embed(B=2, P=5, M=4, K=3, D=7, size=2)
    visible, numbers = 2 * 1 * 3 * 2, 2 * 4 * 8
    parameters = (21 + 7 + 7 * 7 + 2 * 7 + 7) * 2
    tokens = 2 * 7 * 7 * 2
    product = 2 * (2 * 1) * 3 * 7
    assert needs["forward"] == needs["backward"] == Need(visible + numbers + parameters + tokens, product)
    assert needs["both"] == Need(visible + numbers + 2 * parameters + 2 * tokens, 2 * product)


def test_loss():
    needs = formulas.loss(B=2, M=3, K=5, size=4, gathered=True)
    tensor, numbers = 2 * 3 * 5 * 4, 2 * 3 * 8
    product = 2 * 2 * 3 * 3 * 5
    assert needs["forward"] == Need(3 * tensor + numbers, product)
    assert needs["backward"] == Need(5 * tensor + numbers, product)
    assert needs["both"] == Need(5 * tensor + numbers, 2 * product)
    assert formulas.loss(B=2, M=3, K=5, size=4, gathered=False)["forward"].bytes == 3 * tensor


def test_attention():
    needs = formulas.attention(B=2, H=3, N=4, d=5, size=2)
    tensor, product = 2 * 3 * 4 * 5 * 2, 2 * (2 * 3) * 4 * 4 * 5
    assert needs == {
        "forward": Need(4 * tensor, 2 * product),
        "backward": Need(7 * tensor, 4 * product),
        "both": Need(8 * tensor, 6 * product),
    }


def test_ceilings():
    assert formulas.copy(100)["forward"] == Need(200, 0)
    assert formulas.matmul(10, 2)["forward"] == Need(600, 2000)
