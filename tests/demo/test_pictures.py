import pytest
from PIL import Image

from improved_ldm.demo.pictures import PictureFolder


@pytest.fixture
def image():
    return Image.new("RGB", (8, 8))


def test_equal_images_are_files_of_their_own(image):
    pictures = PictureFolder()
    one, other = pictures.save(image, {}), pictures.save(image, {})
    assert one != other
    pictures.remove([one, "nothing"])
    assert [str(file) for file in pictures.path.iterdir()] == [other]
    pictures.clear()
    assert list(pictures.path.iterdir()) == []


def test_the_oldest_files_make_room(image):
    size = _bytes_of(image)
    pictures = PictureFolder(max_bytes=3 * size)
    files = [pictures.save(image, {}) for _ in range(5)]
    assert {str(file) for file in pictures.path.iterdir()} == set(files[2:])


def test_an_image_larger_than_the_limit_is_alone(image):
    pictures = PictureFolder(max_bytes=1)
    files = [pictures.save(image, {}) for _ in range(2)]
    assert [str(file) for file in pictures.path.iterdir()] == files[1:]


def test_the_folder_ends_with_what_holds_it(image):
    pictures = PictureFolder()
    path = pictures.path
    pictures.save(image, {})
    del pictures
    assert not path.exists()


def test_a_kept_image_stays_until_all_go(image):
    pictures = PictureFolder(max_bytes=1)
    kept = pictures.keep("plain", image, {"seed": "7"})
    pictures.remove([kept])
    files = [pictures.save(image, {}) for _ in range(3)]
    assert kept in pictures and files[-1] in pictures and files[0] not in pictures
    assert {str(file) for file in pictures.path.iterdir()} == {kept, files[-1]}
    pictures.clear()
    assert list(pictures.path.iterdir()) == [] and kept not in pictures


def _bytes_of(image) -> int:
    pictures = PictureFolder()
    pictures.save(image, {})
    return sum(file.stat().st_size for file in pictures.path.iterdir())
