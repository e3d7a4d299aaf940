"""Bad input ends in one error that names file, field and remedy, and nothing is written; odd but good input is converted."""
import errno
import io
import os
import subprocess

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dal_med.data.atomic import clear_disk_errors
from dal_med.data.datasets import open_dataset, save_array, write_dataset
from dal_med.data.prepare import dal_prepare
from dal_med.data.prepare_set import prepare_set
from dal_med.data.sets.ham10000 import read_ham10000
from dal_med.data.splits import check_split, grouped_folds, grouped_split

def prepared(source, dest, masks=True, size=16):
    return prepare_set(read_ham10000(source, masks=masks), dest, size=size, progress=False)


DX = ('nv', 'nv', 'mel', 'bkl', 'bcc', 'akiec', 'vasc', 'df')
ABOUT = dict(name='example', classes=('MEL', 'NV'), source='random numbers', licence='CC0', citation='none')


def picture(i, size=(60, 45)):
    "A picture with coarse structure of its own, so that no two are near-duplicates."
    coarse = np.random.default_rng(i).integers(30, 226, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(img, format='JPEG', **options):
    file = io.BytesIO()
    img.save(file, format, **options)
    return file.getvalue()


class Download:
    "A source folder of eight images in either layout; a test damages it, then calls `write`."

    def __init__(self, folder, layout):
        self.folder, self.layout = folder, layout
        self.images = {f'ISIC_{i:07}': encoded(picture(i), quality=95) for i in range(len(DX))}
        self.rows = [[f'HAM_{max(0, i - 1)}', f'ISIC_{i:07}', dx, '50.0', 'male', 'back'] for i, dx in enumerate(DX)]
        self.table = 'HAM10000_metadata' if layout == 'official' else 'metadata.csv'

    def write(self):
        self.folder.mkdir()
        lines = ['lesion_id,image_id,dx,age,sex,localization', *map(','.join, self.rows)]
        (self.folder/self.table).write_text('\n'.join(lines) + '\n')
        if self.layout == 'parquet':
            pd.DataFrame(dict(image_id=list(self.images), image=list(self.images.values()))).to_parquet(self.folder/'images_60x45.parquet')
        else:
            for n, (name, content) in enumerate(self.images.items()):
                part = self.folder/f'HAM10000_images_part_{1 + n % 2}'
                part.mkdir(exist_ok=True)
                (part/f'{name}.jpg').write_bytes(content)
        return self.folder

    def refused(self, *expected, **options):
        "Preparing fails with all `expected` in the message, and neither destination nor a temporary folder is left."
        dest = self.folder.parent/'out'/'prepared'
        with pytest.raises((ValueError, OSError)) as e: prepared(self.write(), dest, **options)
        for text in expected: assert text in str(e.value), str(e.value)
        assert not dest.parent.exists() or not list(dest.parent.iterdir())


@pytest.fixture(params=['official', 'parquet'])
def download(request, tmp_path): return Download(tmp_path/'source', request.param)


@pytest.fixture
def official(tmp_path): return Download(tmp_path/'source', 'official')


def test_good(download):
    d = prepared(download.write(), download.folder.parent/'prepared')
    assert (len(d), len(set(d.groups)), d.manifest['near_duplicates']['pairs']) == (8, 7, 0)
    assert [d.classes[i] for i in d.labels] == ['NV', 'NV', 'MEL', 'BKL', 'BCC', 'AKIEC', 'VASC', 'DF']
    assert not download.folder.parent.joinpath('prepared', 'masks.npy').exists()


def test_row_without_image(download):
    del download.images['ISIC_0000003']
    download.refused(download.table, '1 of 8 rows have no image', 'ISIC_0000003', 'complete the download')


def test_image_without_row(download):
    del download.rows[4]
    download.refused('1 images have no row', download.table, 'ISIC_0000004', 'complete the table, or remove these images')


def test_truncated_image(download):
    for name in ('ISIC_0000002', 'ISIC_0000005'): download.images[name] = download.images[name][:400]
    download.refused('2 of 8 images cannot be used', 'ISIC_0000002', 'ISIC_0000005', '400 bytes', 'download it again', 'nothing was written')


@pytest.mark.parametrize('content', [b'', b'<html>not found</html>', b'\xff\xd8\xff\xe0' + bytes(500)])
def test_no_image(download, content):
    download.images['ISIC_0000002'] = content
    download.refused('ISIC_0000002', 'cannot be decoded', 'download it again')


def test_image_vanishes_after_the_check(official):
    found = read_ham10000(official.write())
    (official.folder/found.images[3].name).unlink()
    with pytest.raises(ValueError, match='ISIC_0000003.jpg is no longer there: the source changed while it was read'): prepare_set(found, official.folder.parent/'out'/'prepared', progress=False)
    assert not list((official.folder.parent/'out').iterdir())


def test_unknown_diagnosis(download):
    download.rows[3][2] = 'melanom'
    download.refused(download.table, 'column dx', "'melanom'", 'rows 3', 'accepted: akiec, bcc, bkl, df, mel, nv, vasc')


def test_duplicate_id_in_table(download):
    download.rows.append(download.rows[2])
    download.refused(download.table, 'column image_id', 'ISIC_0000002', 'keep one row an image')


def test_duplicate_id_in_parquet(tmp_path):
    d = Download(tmp_path/'source', 'parquet')
    d.write()
    pd.DataFrame(dict(image_id=['ISIC_0000002'], image=[d.images['ISIC_0000003']])).to_parquet(d.folder/'images_more.parquet')
    with pytest.raises(ValueError, match='ISIC_0000002 lies in two different files, .*images_more.parquet'): prepared(d.folder, tmp_path/'prepared')


def test_one_id_two_files(official):
    official.write()
    copy = official.folder/'a copy'
    copy.mkdir()
    (copy/'ISIC_0000002.jpg').write_bytes(official.images['ISIC_0000002'])
    assert len(prepared(official.folder, official.folder.parent/'prepared')) == 8
    (copy/'ISIC_0000002.jpg').write_bytes(official.images['ISIC_0000003'])
    with pytest.raises(ValueError, match='ISIC_0000002 lies in two different files'): prepared(official.folder, official.folder.parent/'other')


def test_missing_column(download):
    for row in download.rows: row[2] = ''
    download.refused(download.table, 'column dx', '(None)')


def test_no_table(official, tmp_path):
    (official.write()/official.table).unlink()
    with pytest.raises(FileNotFoundError, match='holds no HAM10000 metadata table'): prepared(official.folder, tmp_path/'prepared')
    with pytest.raises(FileNotFoundError, match='does not exist'): prepared(tmp_path/'nowhere', tmp_path/'prepared')
    assert not (tmp_path/'prepared').exists()


def test_mask_of_another_shape(official):
    masks = official.write()/'HAM10000_segmentations_lesion_tschandl'
    masks.mkdir()
    for name in official.images: Image.new('1', (60, 45), 1).save(masks/f'{name}_segmentation.png')
    Image.new('1', (45, 60), 1).save(masks/'ISIC_0000002_segmentation.png')
    with pytest.raises(ValueError, match='mask of .*ISIC_0000002.jpg is 45x60 and its image 60x45'): prepared(official.folder, official.folder.parent/'prepared')
    (masks/'ISIC_0000002_segmentation.png').unlink()
    with pytest.raises(ValueError, match='1 of 8 rows have no mask .* or prepare without masks'): prepared(official.folder, official.folder.parent/'prepared')
    assert len(prepared(official.folder, official.folder.parent/'prepared', masks=False)) == 8


def test_destination_holds_something_else(official, tmp_path, capsys):
    source, dest = official.write(), tmp_path/'prepared'
    dest.mkdir()
    (dest/'thesis.tex').write_text('three years')
    with pytest.raises(SystemExit) as e: dal_prepare('ham10000', [source, dest], size=16)
    said = capsys.readouterr().err
    assert e.value.code == 2 and 'dal_prepare: ' in said and 'nothing was written: choose another destination' in said
    assert [f.name for f in dest.iterdir()] == ['thesis.tex'] and (dest/'thesis.tex').read_text() == 'three years'


def test_second_call_and_another_source(official, tmp_path, capsys):
    source, dest = official.write(), tmp_path/'prepared'
    dal_prepare('ham10000', [source, dest], size=16)
    before = {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in dest.iterdir()}
    capsys.readouterr()
    dal_prepare('ham10000', [source, dest], size=16)
    assert 'is already prepared, nothing to do' in capsys.readouterr().out
    table = source/official.table
    table.write_text(table.read_text().replace('50.0', '60.0', 1))
    with pytest.raises(FileExistsError, match='fingerprint'): prepared(source, dest)
    assert {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in dest.iterdir()} == before


GREY = picture(3).convert('L')
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
CONVERTED = dict(
    grey=(encoded(GREY, 'PNG'), GREY.convert('RGB'), 0),
    rgba=(encoded(picture(3).convert('RGBA'), 'PNG'), picture(3), 0),
    transparent=(encoded(Image.merge('RGBA', (*picture(3).split(), Image.new('L', (60, 45), 0))), 'PNG'), Image.new('RGB', (60, 45)), 0),
    cmyk=(encoded(picture(3).convert('CMYK'), 'JPEG', quality=100, subsampling=0), picture(3), 6),
    palette=(encoded(picture(3).quantize(256), 'PNG'), picture(3), 25),
    sixteen_bit=(encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16)*257), 'PNG'), GREY.convert('RGB'), 0),
    exif_rotated=(encoded(picture(3).transpose(Image.Transpose.ROTATE_90), 'JPEG', quality=100, subsampling=0, exif=ROTATED), picture(3), 6),
    other_size=(encoded(picture(3, (240, 180)), 'PNG'), picture(3, (240, 180)), 0),
    tiny=(encoded(picture(3, (8, 6)), 'PNG'), picture(3, (8, 6)), 0))


@pytest.mark.parametrize('kind', CONVERTED)
def test_other_modes_and_sizes_are_converted(download, kind):
    content, same, tolerance = CONVERTED[kind]
    download.images['ISIC_0000003'] = content
    d = prepared(download.write(), download.folder.parent/'prepared')
    download.folder = download.folder.parent/'plain source'
    download.images['ISIC_0000003'] = encoded(same, 'PNG')
    plain = prepared(download.write(), download.folder.parent/'plain')
    assert np.abs(d.images[3].astype(int) - plain.images[3].astype(int)).max() <= tolerance
    assert (np.delete(d.images, 3, 0) == np.delete(plain.images, 3, 0)).all()


def test_no_exif_reaches_the_prepared_set(official):
    exif = Image.Exif()
    exif[0x010E] = exif[0x0110] = 'born 1950-01-01, room 12'
    official.images['ISIC_0000003'] = encoded(picture(3), exif=exif, comment=b'room 12')
    d = prepared(official.write(), official.folder.parent/'prepared')
    for f in d.path.iterdir(): assert b'room 12' not in f.read_bytes() and str(official.folder).encode() not in f.read_bytes()


def test_near_duplicates_join_lesions(official):
    official.images['ISIC_0000006'] = encoded(picture(2), quality=80)
    official.images['ISIC_0000007'] = official.images['ISIC_0000003']
    d = prepared(official.write(), official.folder.parent/'prepared')
    assert list(d.groups) == ['HAM_0', 'HAM_0', 'HAM_1', 'HAM_2', 'HAM_3', 'HAM_4', 'HAM_1', 'HAM_2']
    assert d.manifest['near_duplicates']['across_groups'] == [['ISIC_0000002', 'ISIC_0000006', 'HAM_1', 'HAM_5'], ['ISIC_0000003', 'ISIC_0000007', 'HAM_2', 'HAM_6']]
    assert d.manifest['identical']['pairs'] == [['ISIC_0000003', 'ISIC_0000007']]


def test_group_in_two_splits():
    groups = ['HAM_1', 'HAM_1', 'HAM_2', 'HAM_3', 'HAM_3']
    with pytest.raises(ValueError, match=r"split 'pool' and 'test' share 2 lesions \(HAM_1, HAM_3\); split by lesion"):
        check_split(['pool', 'test', 'pool', 'test', 'pool'], groups, 'lesion')


def test_class_with_fewer_groups_than_folds():
    labels, groups = [0]*20 + [1]*8, [f'a{i}' for i in range(20)] + ['b1']*4 + ['b2']*4
    with pytest.raises(ValueError, match='class DF has 2 groups for 5 parts or folds; each needs at least one: use fewer folds'): grouped_folds(labels, groups, 5, names=('NV', 'DF'))
    with pytest.raises(ValueError, match='class DF has 2 groups'): grouped_split(labels, groups, names=('NV', 'DF'))


def example(n, side=32):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8), pd.DataFrame(dict(image_id=[rng.bytes(20).hex() for _ in range(n)], label=['NV']*n, group=[str(i) for i in range(n)]))


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 64 KiB."
    disk = tmp_path/'disk'
    disk.mkdir()
    if os.name != 'posix' or os.geteuid() != 0: pytest.skip('mounting a small tmpfs needs root')
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(disk)], capture_output=True, text=True)
    if mounted.returncode: pytest.skip(f'a small tmpfs cannot be mounted here: {mounted.stderr.strip()}')
    yield disk
    subprocess.run(['umount', '-l', str(disk)], check=True)


@pytest.mark.parametrize('n, side', [(100, 32), (3000, 1), (62, 16)], ids=['images', 'metadata', 'after images and metadata'])
def test_full_disk(small_disk, n, side):
    images, metadata = example(n, side)
    with pytest.raises(OSError, match='is full: prepared was not written, and what was there before is untouched; free some space') as e:
        write_dataset(small_disk/'prepared', images, metadata, masks=np.ones(images.shape[:3], bool), **ABOUT)
    assert e.value.errno == errno.ENOSPC
    assert not list(small_disk.iterdir())
    small = write_dataset(small_disk/'prepared', images[:2], metadata[:2], **ABOUT)
    assert len(open_dataset(small.path, verify=True)) == 2


def test_full_disk_through_the_command(small_disk, official, capsys):
    (small_disk/'other').write_bytes(bytes(60_000))
    with pytest.raises(SystemExit) as e: dal_prepare('ham10000', [official.write(), small_disk/'prepared'], size=32)
    assert e.value.code == 2 and 'is full' in capsys.readouterr().err
    assert [f.name for f in small_disk.iterdir()] == ['other']


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='there is no /dev/full here')
def test_full_device():
    with pytest.raises(OSError, match='is full: images.npy was not written'), clear_disk_errors('prepared/images.npy'): save_array('/dev/full', np.zeros((9, 9999), np.uint8))
