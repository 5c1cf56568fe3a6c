"""L∞ with an ε for each coordinate, and masks: against linear programmes, and against L∞ itself."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn

import innermax as im
from innermax.attacks.noisy_pgd import NoisyPGD
from innermax.evaluation.store import OtherRows
from innermax.utils.serialization import describe
from tests.helpers.attacks import FOR_ANY_THREAT, Linear, crowd
from tests.helpers.evaluation import examples, network

SHAPE = (2, 3, 4)
D = 24


def draw(seed, bounds, dtype=torch.float64):
    """A threat model with masked, tiny and full coordinates, inputs at and off the bounds, points of X(x), slopes."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.rand(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    shares = rand(*SHAPE)
    shares[rand(*SHAPE) < 0.3] = 0
    shares[rand(*SHAPE) < 0.1] = 1e-3
    threat = im.LinfBox(0.3, bounds, shares=shares)
    x = (1.5 * rand(3, *SHAPE) - 0.25).clamp(0, 1).to(dtype)
    gradient = (2 * rand(3, *SHAPE) - 1).to(dtype)
    gradient[rand(3, *SHAPE) < 0.1] = 0
    room = threat.eps * shares
    low, high = (x - room, x + room) if bounds is None else ((x - room).clamp(min=0), (x + room).clamp(max=1))
    inside = low + rand(3, *SHAPE) * (high - low)
    return threat, x, gradient, inside.to(dtype), low, high


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None, (torch.zeros(SHAPE), torch.ones(SHAPE))])
@pytest.mark.parametrize("seed", range(4))
def test_maximizer_and_fosc_are_those_of_a_linear_programme(seed, bounds):
    threat, x, gradient, inside, low, high = draw(seed, bounds)
    best = threat.maximizer(gradient, x)
    found = threat.gap(gradient, inside, x)
    share = threat.gap(gradient, inside, x, relative=True)
    ball = threat.gap(gradient, inside, x, bounded=False)
    for row in range(3):
        c = gradient[row].flatten().numpy()
        box = np.stack([low[row].flatten().numpy(), high[row].flatten().numpy()], axis=1)
        highest, lowest = -optimize.linprog(-c, bounds=box).fun, optimize.linprog(c, bounds=box).fun
        at = c @ inside[row].flatten().numpy()
        assert c @ best[row].flatten().numpy() == pytest.approx(highest, abs=1e-9)
        assert float(found[row]) == pytest.approx(highest - at, abs=1e-9)
        assert float(share[row]) == pytest.approx((highest - at) / (highest - lowest), abs=1e-9)
        # Wang et al. 2019, Eq. 5, with an ε of its own for each coordinate
        room = threat.eps * threat.shares.values.flatten().numpy()
        closed = (room * np.abs(c)).sum() - c @ (inside[row] - x[row]).flatten().numpy()
        assert float(ball[row]) == pytest.approx(closed, abs=1e-9)
    assert bool((threat.gap(gradient, best, x) < 1e-12).all())
    still = (gradient == 0) | (threat.shares.values == 0)
    assert torch.equal(best[still.expand_as(best)], x[still.expand_as(best)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_points_are_projected_and_drawn_into_the_box(bounds, dtype):
    threat, x, gradient, inside, low, high = draw(7, bounds, dtype)
    far = x + gradient
    nearest = threat.project(far, x)
    torch.testing.assert_close(nearest, far.clamp(low.to(dtype), high.to(dtype)), rtol=0, atol=1e-6)
    assert torch.equal(threat.project(nearest, x), nearest)
    torch.testing.assert_close(threat.project(inside, x), inside, rtol=0, atol=1e-7)
    starts = torch.stack([threat.sample(x, seed=seed) for seed in range(300)])
    for point in (nearest, *starts[:5], threat.maximizer(gradient, x), threat.step(inside, gradient, 0.1, x)):
        assert bool(threat.contains(point, x).all())
        masked = (threat.shares.values == 0).expand_as(x)
        assert torch.equal(point[masked], x[masked])
    spread = (starts.amax(0) - starts.amin(0)).double()
    assert bool((spread > 0.9 * (high - low).double() - 1e-6).all())
    moved = threat.step(inside, gradient, 0.1, x)
    expected = (inside + 0.1 * threat.shares.values * gradient.sign()).clamp(low, high)
    torch.testing.assert_close(moved.double(), expected.double(), rtol=0, atol=1e-6)


def test_what_leaves_the_box_is_not_contained():
    threat, x, *_, low, high = draw(3, (0.0, 1.0))
    for place in np.ndindex(*SHAPE):
        for edge, sign in ((low, -1), (high, 1)):
            point = x.clone()
            point[(0, *place)] = edge[(0, *place)] + sign * 1e-4
            assert threat.contains(point, x).tolist() == [False, True, True]
            point[(0, *place)] = edge[(0, *place)] + sign * 1e-8
            assert bool(threat.contains(point, x).all())


@pytest.mark.parametrize("name", FOR_ANY_THREAT)
def test_with_full_shares_it_is_linf(name):
    model, x, y = crowd()
    plain, box = im.Linf(0.03), im.LinfBox(0.03, shares=torch.ones(x.shape[1:]))
    one, other = (FOR_ANY_THREAT[name](threat)(model, x, y, seed=3) for threat in (plain, box))
    assert 0 < one.misclassified.sum() < len(x)
    torch.testing.assert_close(one.x_adv, other.x_adv, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.fosc, other.fosc, rtol=1e-6, atol=1e-6)
    assert torch.equal(one.gradient_calls, other.gradient_calls)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize("name", FOR_ANY_THREAT)
def test_the_optimum_of_a_linear_model_is_found(name, bounds):
    problem = Linear(17, SHAPE, bounds)
    x, y = problem.inputs
    shares = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2))
    shares[0, 0] = 0
    threat = im.LinfBox(0.2, bounds, shares=shares)
    slope = torch.tensor(problem.w, dtype=torch.float32) * torch.where(y == 0, -1.0, 1.0)[:, None]
    best = threat.maximizer(slope.reshape(x.shape), x)
    with torch.no_grad():
        falls = problem.model(best).argmax(1) != y
    assert 0 < falls.sum() < 17
    result = FOR_ANY_THREAT[name](threat)(problem.model, x, y)
    assert threat.contains(result.x_adv, x).all()
    assert torch.equal(result.x_adv[:, 0, 0], x[:, 0, 0])
    assert torch.equal(result.misclassified, falls)
    assert (result.relative_fosc[~falls] < 2e-2).all()


def test_an_epsilon_for_each_channel():
    sizes = torch.tensor([4, 8, 2]).reshape(3, 1, 1).expand(3, 4, 4) / 255
    threat = im.LinfBox.of(sizes)
    assert threat.eps == float(sizes.max())
    x = torch.full((2, 3, 4, 4), 0.5)
    moved = threat.maximizer(torch.ones_like(x), x) - x
    torch.testing.assert_close(moved, sizes.expand_as(x), rtol=0, atol=1e-7)
    wider = replace(threat, eps=2 * threat.eps)
    torch.testing.assert_close(wider.maximizer(-torch.ones_like(x), x) - x, -2 * sizes.expand_as(x), rtol=0, atol=1e-7)


def test_threats_are_values():
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, 1] = True
    one, same = im.LinfBox(0.1, shares=mask), im.LinfBox(np.float64(0.1), shares=mask.double().numpy())
    assert (one, hash(one), repr(one)) == (same, hash(same), repr(same))
    assert one != im.LinfBox(0.1, shares=~mask)
    assert one != im.LinfBox(0.2, shares=mask)
    assert one != im.LinfBox(0.1, shares=mask.flatten())
    assert one != im.LinfBox(0.1, None, shares=mask)
    x = torch.rand(2, *SHAPE)
    one.project(x, x)  # after which it knows its device
    again = pickle.loads(pickle.dumps(im.PGD(one)))
    assert again == im.PGD(one)
    assert hash(again) == hash(im.PGD(same))
    assert replace(one, eps=0.2).shares == one.shares
    large = im.LinfBox(0.1, shares=torch.linspace(0, 1, 3 * 64 * 64).reshape(3, 64, 64))
    near = large.shares.values.clone()
    near[1, 30, 30] = 0
    other = im.LinfBox(0.1, shares=near)
    assert repr(large) != repr(other), "names tell apart what repr(tensor) leaves out"
    assert len(json.dumps(describe(large))) < 200
    assert describe(large) != describe(other)


@pytest.mark.parametrize("norm", [im.Linf, im.L2, im.L1])
def test_bounds_that_are_tensors_compare_by_their_numbers(norm):
    one, same = (norm(0.1, bounds=(torch.zeros(3), torch.ones(3))) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    assert one != norm(0.1, bounds=(torch.zeros(3), torch.tensor([1.0, 1.0, 2.0])))
    assert one != norm(0.1)
    assert norm(0.1) == norm(0.1)
    assert len({norm(0.1), norm(0.1), norm(0.2), im.PGD(norm(0.1)), im.PGD(norm(0.1))}) == 3
    assert im.Linf(0.1) != im.L2(0.1)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: im.LinfBox(0.1, shares=2 * torch.ones(SHAPE)), "shares must be numbers in"),
        (lambda x: im.LinfBox(0.1, shares=torch.full(SHAPE, torch.nan)), "shares must be numbers in"),
        (lambda x: im.LinfBox(0.1, shares=torch.zeros(SHAPE)), "of which one is above 0"),
        (lambda x: im.LinfBox.of(torch.zeros(SHAPE)), "eps must hold finite numbers"),
        (lambda x: im.LinfBox.of(-torch.ones(SHAPE)), "eps must hold finite numbers"),
        (lambda x: im.LinfBox(-0.1, shares=torch.ones(SHAPE)), "eps must be a finite number of at least 0"),
        (lambda x: im.LinfBox(2.0, shares=torch.ones(SHAPE)).around(x), "eps must be at most 1"),
        (
            lambda x: im.LinfBox(0.1, shares=torch.ones(2, 1, 1)).around(x),
            r"one input \(2, 3, 4\), got \(2, 1, 1\)",
        ),
        (lambda x: im.PGD(im.LinfBox(0.1, shares=torch.ones(24)))(nn.Flatten(), x, torch.zeros(2).long()), "one input"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(torch.rand(2, *SHAPE))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [im.FAB, im.Square, im.AutoAttack, im.FMN, im.DDN])
def test_attacks_with_a_geometry_of_their_own_refuse_it(make):
    with pytest.raises(TypeError, match=r"PGD, GuidedPGD and APGD support any threat model") as error:
        make(im.LinfBox(0.1, shares=torch.ones(SHAPE)))
    assert "\n" not in str(error.value)


def masked():
    mask = torch.zeros(1, 6, 6)
    mask[:, :, :3] = 1
    return im.LinfBox(0.2, shares=mask), mask.bool()


def test_evaluations_keep_to_the_mask(tmp_path):
    threat, mask = masked()
    model, (images, labels) = network().eval(), examples()
    attacks = {"pgd": im.PGD(threat, 5), "guided": im.GuidedPGD(threat, 20)}
    options = {"rows_dir": tmp_path / "rows", "quantize": 8, "keep_images": True, "batch_size": 16}
    found = im.evaluate(model, (images, labels), attacks, **options)
    for kept in found.images.values():
        still = ~mask.expand(40, 1, 6, 6).numpy()
        np.testing.assert_allclose(kept[still], (images / 255).numpy()[still], rtol=0, atol=1e-7)
        assert np.abs(kept - (images / 255).numpy()).max() > 0.19
    assert found.accuracy["pgd"].correct < found.accuracy["clean"].correct
    read = im.Evaluation.from_json(found.to_json())
    assert read.accuracy == found.accuracy
    assert "LinfBox(eps=0.2" in read.settings.attacks["pgd"]
    again = im.evaluate(model, (images, labels), attacks, **options)
    assert again.accuracy == found.accuracy
    other = {"pgd": im.PGD(im.LinfBox(0.2, shares=(~mask).float()), 5), "guided": im.GuidedPGD(threat, 20)}
    with pytest.raises(OtherRows, match="Shares"):
        im.evaluate(model, (images, labels), other, **options)
    handed = im.HandedImages(torch.from_numpy(found.images["pgd"]), torch.arange(40))
    checks = {c.name: c for c in im.verify(model, (images, labels), threat, images=handed, attacks=attacks).checks}
    assert checks["handed images inside the threat model"].passed
    beyond = replace(handed, images=im.FGSM(im.Linf(0.1))(model, images / 255, labels).x_adv)
    checks = {c.name: c for c in im.verify(model, (images, labels), threat, images=beyond, attacks=attacks).checks}
    assert not checks["handed images inside the threat model"].passed


def test_noise_beyond_the_ball_keeps_to_the_mask_too():
    threat, mask = masked()
    images, labels = examples(8)
    found = NoisyPGD(threat, 1, 0.2, noise=2.0)(network().eval(), images / 255, labels)
    still = ~mask.expand(8, 1, 6, 6)
    assert torch.equal(found.x_adv[still], (images / 255)[still])
    assert float((found.x_adv - images / 255).abs().max()) > 0.2
