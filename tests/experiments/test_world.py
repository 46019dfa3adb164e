"""world.py: pictures and maps are read back exactly, and the test set is kept apart."""
import itertools
import random

import numpy as np
import pytest

from experiments.world import (
    ARROWS, BACKGROUNDS, COLORS, PLACES, RADII, SHAPES, SIZES, Object, Scene, coverage, depth_map,
    edge_map, held_out, keypoints, pose_map, random_scene, read_picture, read_pose, render,
)

# a small blue square at the top right, a large yellow circle at the bottom left
TWO = (Object("small", "blue", "square", 2), Object("large", "yellow", "circle", 6))


def scenes(number, seed=0):
    rng = random.Random(seed)
    return [random_scene(rng, 1 + i % 3) for i in range(number)]


# ---------------------------------------------------------------- pictures

def test_five_hundred_pictures_are_read_back_exactly():
    drawn = scenes(500)
    assert {s.background for s in drawn} == set(BACKGROUNDS)
    assert {len(s.objects) for s in drawn} == {1, 2, 3}
    shifts = {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)}
    assert {o.shift for s in drawn for o in s.objects} == shifts
    for scene in drawn:
        shown, error = read_picture(render(scene))
        assert shown == scene and error == 0


def test_no_object_is_taken_for_another():
    for i, (size, color, shape) in enumerate(itertools.product(SIZES, COLORS, SHAPES)):
        o = Object(size, color, shape, i % 9, (i % 3 - 1, i // 3 % 3 - 1))
        for background in BACKGROUNDS:
            scene = Scene((o,), background)
            assert read_picture(render(scene))[0] == scene


def test_empty_and_full_scenes():
    for background in BACKGROUNDS:
        empty = Scene((), background)
        assert read_picture(render(empty)) == (empty, 0.0)
    full = random_scene(random.Random(0), 9)
    assert [o.cell for o in full.objects] == list(range(9))
    assert read_picture(render(full))[0] == full


def test_noise_of_a_few_grey_levels():
    generator = np.random.default_rng(0)
    for scene in scenes(100, seed=1):
        noise = generator.normal(0, 6, (64, 64, 3))
        noisy = np.clip(render(scene) + noise, 0, 255).round().astype(np.uint8)
        shown, error = read_picture(noisy)
        assert shown == scene and 3 < error < 7         # the mean of |noise| is 0.8 x 6


def test_error_is_that_of_the_objects_cells():
    scene = Scene((Object("large", "red", "circle", 4),), "gray")
    picture = render(scene)
    picture[:20, :20] += 5                              # an empty cell: does not count
    picture[22:42, 22:42] += 10                         # the object's cell
    shown, error = read_picture(picture)
    assert shown == scene and error == 10


def test_pictures_of_another_size():
    with pytest.raises(ValueError, match="64"):
        read_picture(np.zeros((64, 32, 3), np.uint8))


def test_render_draws_the_scene():
    picture = render(Scene(TWO, "black"))
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert tuple(picture[12, 52]) == COLORS["blue"]     # the centre of the top right cell
    assert tuple(picture[52, 12]) == COLORS["yellow"]   # the centre of the bottom left cell
    assert tuple(picture[32, 32]) == tuple(picture[0, 0]) == BACKGROUNDS["black"]
    assert (picture[52, :, 0] > 127).sum() == 18        # the widths of the objects, less outlines
    assert (picture[12, :, 2] > 118).sum() == 14


def test_shift_moves_right_and_down():
    def picture(shift):
        return render(Scene((Object("small", "red", "triangle", 4, shift),), "white"))

    still, moved = picture((0, 0)), picture((1, -1))
    assert np.array_equal(moved[22:41, 23:42], still[23:42, 22:41])


def test_content_ignores_displacements_only():
    first = Object("small", "red", "circle", 1, (1, 0))
    second = Object("large", "red", "circle", 5)
    scene = Scene((first, second), "gray")
    moved = Scene((first._replace(shift=(0, -1)), second), "gray")
    turned = Scene((second, first), "gray")
    assert moved.content() == scene.content() == turned.content()
    others = [scene._replace(background="black"), scene._replace(objects=(first,))]
    for change in ({"size": "large"}, {"color": "blue"}, {"shape": "square"}, {"cell": 2}):
        others.append(scene._replace(objects=(first._replace(**change), second)))
    assert all(other.content() != scene.content() for other in others)


def test_coverage_is_between_nothing_and_everything():
    for size in SIZES:
        areas = [coverage(shape, size, (0, 0)) for shape in SHAPES]
        assert all(a.min() == 0 and a.max() == 1 for a in areas)
        circle, square, triangle = (a.sum() for a in areas)
        a, b, c = (RADII[shape][SIZES.index(size)] for shape in SHAPES)
        assert abs(circle / (np.pi * a ** 2) - 1) < 0.05
        assert abs(square / (2 * b) ** 2 - 1) < 0.05
        assert abs(triangle / (c * (2 * c - 1)) - 1) < 0.1


def test_every_place_has_its_name():
    rows, columns = ("top", "center", "bottom"), ("left", "center", "right")
    for cell, place in enumerate(PLACES):
        expected = f"{rows[cell // 3]} {columns[cell % 3]}"
        assert place == ("center" if cell == 4 else expected)


# ---------------------------------------------------------------- maps

def test_poses_are_read_back_exactly():
    rng = random.Random(10)
    drawn = [random_scene(rng, 1 + i % 3, ARROWS) for i in range(200)]
    drawn.append(random_scene(rng, 9, ARROWS))
    assert {o.shape for s in drawn for o in s.objects} == set(ARROWS)
    for scene in drawn:
        expected = [o._replace(color="red") for o in scene.objects]     # the colour is not shown
        assert read_pose(pose_map(scene)) == expected
    assert read_pose(pose_map(Scene((), "gray"))) == []


@pytest.mark.parametrize("arrow, way", list(zip(ARROWS, ((0, -1), (1, 0), (0, 1), (-1, 0)))))
def test_arrows_point_where_their_name_says(arrow, way):
    """The wide half of the picture and the green end of the pose map are on the named side."""
    for size, shift in itertools.product(SIZES, ((0, 0), (1, -1), (-1, 0))):
        o = Object(size, "yellow", arrow, 4, shift)
        tail, tip = keypoints(o)
        assert np.array_equal(np.sign(tip - tail), way)
        assert np.allclose((tip + tail) / 2, 9.5 + np.array(shift))

        y, x = np.mgrid[:20, :20] - 9.5
        ahead = (x - shift[0]) * way[0] + (y - shift[1]) * way[1]       # (20, 20) from the middle
        covered = coverage(arrow, size, shift)
        # the widths across the arrow at these distances from its middle
        widths = {side: covered[ahead == side].sum() for side in (-4.5, -1.5, 1.5, 4.5)}
        assert widths[1.5] > 1.5 * widths[-1.5] and widths[1.5] > 1.5 * widths[4.5] > 0
        assert np.isclose(widths[-1.5], widths[-4.5], atol=0.01)

        cell = pose_map(Scene((o,), "black"))[22:42, 22:42].astype(int)         # (20, 20, 3)
        picture = render(Scene((o,), "black"))[22:42, 22:42]                    # (20, 20, 3)
        (tail_x, tail_y), (tip_x, tip_y) = tail.round().astype(int), tip.round().astype(int)
        assert tuple(cell[tip_y, tip_x]) == (60, 255, 60)
        assert tuple(cell[tail_y, tail_x]) == (60, 110, 255)
        assert tuple(picture[tip_y, tip_x]) == COLORS["yellow"]
        assert tuple(picture[tail_y, tail_x]) == COLORS["yellow"]


def test_arrows_are_turns_of_one_another():
    for size in SIZES:
        up, right, down, left = (coverage(arrow, size, (0, 0)) for arrow in ARROWS)
        for turns, other in ((1, right), (2, down), (3, left)):
            assert np.allclose(np.rot90(up, -turns), other, atol=1e-5)
            assert not np.allclose(up, other, atol=0.5)


def test_depth_of_a_known_scene():
    scene = Scene(TWO, "white")
    depth = depth_map(scene)
    assert depth.shape == (64, 64, 3) and depth.dtype == np.uint8
    assert (depth == depth[..., :1]).all()
    assert depth[12, 52, 0] == 128 and depth[52, 12, 0] == 255
    assert depth[32, 32, 0] == depth[0, 0, 0] == 0
    inside = np.abs(render(scene).astype(int) - BACKGROUNDS["white"]).sum(2) > 0
    assert np.array_equal(depth[..., 0] > 0, inside)    # nearness exactly where an object is drawn
    repainted = Scene(tuple(o._replace(color="red") for o in scene.objects), "black")
    assert np.array_equal(depth_map(repainted), depth)  # colours do not enter


def test_edges_of_a_known_scene():
    scene = Scene(TWO, "white")
    edges = edge_map(scene)
    assert edges.shape == (64, 64, 3) and edges.dtype == np.uint8
    assert (edges == edges[..., :1]).all()
    for x, y in ((52, 12), (12, 52), (32, 32), (0, 0)):
        assert edges[y, x, 0] == 0                      # neither inside nor far outside
    on = edges[..., 0] > 127
    outside = (render(scene) == BACKGROUNDS["white"]).all(2)
    assert not on[outside].any()                        # an outline is within its object
    # the middles, and half the square's side and the circle's radius
    for y, x, r in ((11.5, 51.5, 6.0), (51.5, 11.5, 9.0)):
        for line, middle in ((on[round(y)], x), (on[:, round(x)], y)):
            places = np.flatnonzero(line)
            near = places[abs(places - middle) < 10.5]
            # two strokes, three pixels wide
            assert (near < middle).sum() == (near > middle).sum() == 3
            distances = abs(near - middle)
            assert (r - 3 <= distances).all() and (distances <= r + 0.5).all()
    repainted = Scene(tuple(o._replace(color="red") for o in scene.objects), "black")
    assert np.array_equal(edge_map(repainted), edges)


def test_edges_show_shape_size_and_place():
    drawn = set()
    for size, shape, cell in itertools.product(SIZES, SHAPES, (0, 4)):
        drawn.add(edge_map(Scene((Object(size, "red", shape, cell),), "gray")).tobytes())
    assert len(drawn) == 12


def test_pose_of_another_size():
    with pytest.raises(ValueError, match="64"):
        read_pose(np.zeros((32, 64, 3), np.uint8))


# ---------------------------------------------------------------- the test set

def test_held_out_is_a_tenth_of_the_sets_of_objects():
    for count in (1, 2, 3):
        rng = random.Random(count)
        drawn = [random_scene(rng, count) for _ in range(4000)]
        assert 0.07 < np.mean([held_out(s) for s in drawn]) < 0.13


def test_held_out_depends_on_the_objects_alone():
    for scene in scenes(200, seed=3):
        moved = tuple(o._replace(shift=(0, 0)) for o in reversed(scene.objects))
        for objects, background in itertools.product((scene.objects, moved), BACKGROUNDS):
            assert held_out(Scene(objects, background)) == held_out(scene)
    looks = itertools.product(SIZES, COLORS, SHAPES, range(9))
    single = [Scene((Object(*look),), "gray") for look in looks]
    assert 0.05 < np.mean([held_out(s) for s in single]) < 0.15
