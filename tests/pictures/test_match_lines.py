"""Where lines begin and end, what is right and wrong, and where heat is."""

import numpy as np
import pytest
from PIL import Image

from diffusers_repr.pictures.match_lines import draw_match_lines, draw_similarity, match_colours, stack_pictures

LEFT, RIGHT = Image.new("RGB", (40, 20), (90, 90, 90)), Image.new("L", (20, 20), 90)
POINTS, MATCHES = np.array([[9.5, 4.5], [29.5, 14.5]]), np.array([[4.5, 4.5], [14.5, 14.5]])


def test_lines_run_from_point_to_match():
    sheet = np.asarray(draw_match_lines(LEFT, RIGHT, POINTS, MATCHES, correct=[True, False], height=100))
    assert sheet.shape == (116, 200 + 100 + 24, 3)
    for row, shade in ((8 + 25, (40, 200, 80)), (8 + 75, (235, 50, 50))):
        for column in (8 + 50, 216 + 25) if shade[0] == 40 else (8 + 150, 216 + 75):
            assert tuple(sheet[row, column]) == shade
    assert tuple(sheet[8 + 25, 140]) == (40, 200, 80)  # the line between
    assert tuple(sheet[8 + 50, 100]) == (90, 90, 90)  # nothing is drawn there
    own = {tuple(pixel) for pixel in np.asarray(draw_match_lines(LEFT, RIGHT, POINTS, MATCHES)).reshape(-1, 3)}
    assert set(match_colours(2)) <= own
    assert draw_match_lines(LEFT, RIGHT, POINTS, MATCHES, height=100, title="a").height == 116 + 22


def test_heat_is_where_the_likeness_is():
    similarity = np.zeros((1, 20, 40))
    similarity[0, 5:10, 30:35] = 1
    picture = np.asarray(draw_similarity(LEFT, similarity, np.array([[2.0, 2.0]]), height=100, names=["one"]), int)
    image = picture[30 : 30 + 100, 8 : 8 + 200]
    assert image[37, 162].sum() > image[80, 50].sum() + 300
    with pytest.raises(ValueError, match="0 similarity maps for 1 matches"):
        draw_similarity(LEFT, similarity[:0], np.zeros((1, 2)))


def test_pictures_stack_and_wrong_numbers_are_refused():
    stacked = stack_pictures([LEFT, RIGHT])
    assert stacked.size == (40, 40)
    assert stacked.getpixel((39, 39)) == (255, 255, 255)
    assert len(set(match_colours(12))) == 12
    with pytest.raises(ValueError, match="must both be"):
        draw_match_lines(LEFT, RIGHT, POINTS, MATCHES[:1])
    with pytest.raises(ValueError, match="and 1 truths"):
        draw_match_lines(LEFT, RIGHT, POINTS, MATCHES, correct=[True])
