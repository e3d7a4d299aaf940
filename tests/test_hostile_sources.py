"""Sources that are damaged, forged or change under way: each ends in one error that names the file, or in a prepared set without a wrong row."""
import io
import os
import shutil
import stat
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dal_med.data import atomic
from dal_med.data.datasets import open_dataset
from dal_med.data.prepare_set import prepare_set
from dal_med.data.sets.ham10000 import read_ham10000
from test_bad_input import DX, encoded, picture

N = len(DX)
IDS = [f'ISIC_{i:07}' for i in range(N)]
LINES = ['lesion_id,image_id,dx,age,sex,localization', *(f'HAM_{i},{IDS[i]},{DX[i]},{40 + i}.0,male,back' for i in range(N))]


def contents():
    "The files of a good source: name -> bytes. Every third image is a PNG."
    def image(i): return (f'{IDS[i]}.png', encoded(picture(i), 'PNG')) if i % 3 == 2 else (f'{IDS[i]}.jpg', encoded(picture(i), quality=95))
    return {'HAM10000_metadata.csv': ('\n'.join(LINES) + '\n').encode(), **{f'HAM10000_images_part_1/{name}': content for name, content in map(image, range(N))}}


GOOD = contents()
FIRST = f'HAM10000_images_part_1/{IDS[0]}.jpg'


def write(folder, files):
    for name, content in files.items():
        path = folder/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def zipped(path, files, plant=lambda z: None):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, content in files.items(): z.writestr(name, content)
        plant(z)
    return path


def prepared(source, dest, **options): return prepare_set(read_ham10000(source), dest, size=8, progress=False, threads=1, **options)


def refused(source, *expected):
    "Reading or preparing fails with all `expected` in the message, and nothing is left beside the source."
    before = sorted(source.parent.iterdir())
    with pytest.raises((ValueError, OSError)) as e: prepared(source, source.parent/'out')
    for text in expected: assert text in str(e.value), str(e.value)
    str(e.value).encode()
    assert sorted(source.parent.iterdir()) == before


def same_rows(d, good, but=()):
    "Every row of `d` equals the row of that id in `good`, pixels and table; those `but` may differ."
    at = {i: k for k, i in enumerate(good.image_ids)}
    for k, i in enumerate(d.image_ids):
        if i in but: continue
        assert (d.images[k] == good.images[at[i]]).all() and (d.thumbnails[k] == good.thumbnails[at[i]]).all(), i
        pd.testing.assert_series_equal(d.metadata.iloc[k].drop('group'), good.metadata.iloc[at[i]].drop('group'), check_names=False)


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp('good')
    return prepared(write(folder/'source', GOOD), folder/'prepared')


# --- archives

def test_good_zip(good, tmp_path):
    d = prepared(zipped(tmp_path/'all.zip', GOOD), tmp_path/'out')
    same_rows(d, good)
    assert len(d) == N


@pytest.mark.parametrize('name', ['../../evil.jpg', '/etc/evil.jpg', 'a/../../evil.jpg', '..\\evil.jpg', 'C:\\evil.jpg', '\\\\server\\evil.jpg', 'HAM10000_images_part_1/..'])
def test_zip_that_leads_out(tmp_path, name):
    source = zipped(tmp_path/'all.zip', GOOD, lambda z: z.writestr(zipfile.ZipInfo(name), b'x'))
    refused(source, 'all.zip', 'leads out of the archive', 'nothing was written')
    assert not (tmp_path.parent/'evil.jpg').exists()


def test_zip_with_link(tmp_path):
    link = zipfile.ZipInfo('HAM10000_images_part_1/ISIC_0000099.jpg')
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    refused(zipped(tmp_path/'all.zip', GOOD, lambda z: z.writestr(link, '/etc/passwd')), 'ISIC_0000099.jpg', 'is a link')


def test_encrypted_zip(tmp_path):
    "Flag bit 0 of both headers, as an encrypting program sets it."
    content = bytearray(zipped(tmp_path/'all.zip', GOOD).read_bytes())
    for signature, offset in ((b'PK\3\4', 6), (b'PK\1\2', 8)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(signature, at + 4)
    (tmp_path/'all.zip').write_bytes(content)
    refused(tmp_path/'all.zip', 'is encrypted')


def test_zip_bomb(tmp_path):
    refused(zipped(tmp_path/'all.zip', GOOD, lambda z: z.writestr('HAM10000_images_part_1/ISIC_0000099.jpg', bytes(20_000_000))), 'ISIC_0000099.jpg', 'unpacks to 20,000,000 bytes')


def test_zip_that_lies_about_sizes(good, tmp_path):
    "A member that unpacks to more than its directory says is not unpacked further, and not used."
    info = []
    source = zipped(tmp_path/'all.zip', GOOD)
    content = bytearray(source.read_bytes())
    with zipfile.ZipFile(source) as z: info = z.getinfo(FIRST)
    at = content.find(b'PK\1\2')
    while content[at + 46:at + 46 + len(FIRST)] != FIRST.encode(): at = content.find(b'PK\1\2', at + 4)
    struct.pack_into('<I', content, at + 24, info.file_size - 10)
    source.write_bytes(content)
    refused(source, IDS[0])
    same_rows(d := prepared(source, tmp_path/'out', damaged='leave_out'), good)
    assert list(d.manifest['notes']['damaged']) == [IDS[0]]


def test_zip_with_two_members_of_one_name(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        source = zipped(tmp_path/'all.zip', GOOD, lambda z: z.writestr(FIRST, GOOD[f'HAM10000_images_part_1/{IDS[1]}.jpg']))
    refused(source, IDS[0], 'more than once')


@pytest.mark.parametrize('content', [b'', b'PK', b'<html>please log in</html>', b'PK\5\6' + bytes(18)])
def test_zip_that_is_none(tmp_path, content):
    (tmp_path/'all.zip').write_bytes(content)
    refused(tmp_path/'all.zip', '')


def test_zip_with_a_directory_that_is_cut_off(tmp_path):
    source = zipped(tmp_path/'all.zip', GOOD)
    source.write_bytes(source.read_bytes()[:-50])
    refused(source, 'all.zip is no readable zip file', 'download it again')


# --- images

def chunk(kind, content): return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def png(width, height, data=b''):
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')


HOSTILE = {
    'bomb of 50,000 x 50,000': (png(50_000, 50_000), '50'),
    'bomb just below the limit of PIL': (png(12_000, 12_000), '12,000 x 12,000 pixels'),
    'claims more than it holds': (png(2_000, 2_000, bytes(100)), 'cannot be decoded'),
    'no pixels': (png(0, 0), 'cannot be decoded'),
    'truncated JPEG': (GOOD[FIRST][:len(GOOD[FIRST])//2], 'truncated'),
    'JPEG without its last byte but one segment': (GOOD[FIRST][:200], 'cannot be decoded'),
    'empty file': (b'', '0 bytes'),
    'a web page': (b'<html>404</html>', 'cannot be decoded'),
    'text chunk bomb': (png(4, 4, bytes(52))[:33] + chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(80_000_000))) + png(4, 4, bytes(52))[33:], 'cannot be decoded'),
}


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_image(good, tmp_path, kind):
    content, expected = HOSTILE[kind]
    source = write(tmp_path/'source', {**GOOD, FIRST: content})
    refused(source, IDS[0], expected)
    d = prepared(source, tmp_path/'out', damaged='leave_out')
    same_rows(d, good)
    assert len(d) == N - 1 and IDS[0] in d.manifest['notes']['damaged']


# --- tables

def table(*changes, lines=LINES, encoding='utf-8', newline='\n'):
    lines = list(lines)
    for at, old, new in changes: lines[at] = lines[at].replace(old, new)
    return (newline.join(lines) + newline).encode(encoding)


TABLES = {
    'byte-order mark': table(encoding='utf-8-sig'),
    'UTF-16': table(encoding='utf-16'),
    'semicolons': table(lines=[line.replace(',', ';') for line in LINES]),
    'tabs': table(lines=[line.replace(',', '\t') for line in LINES]),
    'CRLF': table(newline='\r\n'),
    'CR alone': table(newline='\r'),
    'empty lines': table(newline='\n\n'),
    'quotes': table(lines=[','.join(f'"{v}"' for v in line.split(',')) for line in LINES]),
    'spaces': table(lines=[line.replace(',', ' , ') for line in LINES]),
    'all of it': table(encoding='utf-8-sig', newline='\r\n', lines=[';'.join(f'"{v}"' for v in line.split(',')) for line in LINES]),
}


@pytest.mark.parametrize('kind', TABLES)
def test_odd_table_is_read(good, tmp_path, kind):
    d = prepared(write(tmp_path/'source', {**GOOD, 'HAM10000_metadata.csv': TABLES[kind]}), tmp_path/'out')
    same_rows(d, good)
    assert len(d) == N


BAD_TABLES = {
    'formula as id': (table((3, 'ISIC_0000002', "=cmd|' /C calc'!A0")), 'image_id'),
    'formula as lesion': (table((3, 'HAM_2', '=HYPERLINK(A1)')), 'column lesion_id: rows 2'),
    'formula as site': (table((3, 'back', '@SUM(1+1)*cmd')), 'column localization'),
    'formula as diagnosis': (table((3, ',mel,', ',=mel,')), 'dx'),
    'duplicate header': (table((0, 'age', 'dx')), "'dx' appear more than once"),
    'ragged row': (table((4, ',male', '')), 'line 5: 5 fields and 6 columns'),
    'longer row': (table((4, 'back', 'back,lower')), 'line 5: 7 fields and 6 columns'),
    'zero byte': (table((4, 'back', 'ba\0ck')), 'zero bytes'),
    'not UTF-8': (table((4, 'back', 'ré'), encoding='latin-1'), 'not in UTF-8'),
    'open quote': (table((4, 'back', '"back')), 'line'),
    'empty file': (b'', 'is empty'),
    'byte-order mark alone': (b'\xff\xfe', 'is empty'),
    'separators alone': (b';;;\n;;;\n', 'is empty'),
    'header alone': (table(lines=LINES[:1]), 'no rows'),
    'column missing': (table((0, 'dx', 'diagnosis')), 'columns dx are missing'),
    'path as id': (table((3, 'ISIC_0000002', '../ISIC_0000002')), 'image_id'),
    'age of 1,000': (table((3, '42.0', '1000')), 'age'),
    'age in words': (table((3, '42.0', 'forty')), 'age'),
    'infinite age': (table((3, '42.0', 'inf')), 'age'),
    'a web page': (b'<html>please log in</html>', 'missing'),
    'cut off': (table()[:150], ''),
}


@pytest.mark.parametrize('kind', BAD_TABLES)
def test_bad_table(tmp_path, kind):
    content, expected = BAD_TABLES[kind]
    refused(write(tmp_path/'source', {**GOOD, 'HAM10000_metadata.csv': content}), 'HAM10000_metadata.csv', expected)


# --- names

def test_names_that_are_no_utf8(good, tmp_path):
    "Such a file beside the data set is ignored; as a part of it, it can be named."
    source = write(tmp_path/'source', GOOD)
    with open(os.path.join(os.fsencode(source), b'caf\xe9 notes.txt'), 'wb') as f: f.write(b'x')
    with open(os.path.join(os.fsencode(source), b'caf\xe9.jpg'), 'wb') as f: f.write(GOOD[FIRST])
    folder = os.path.join(os.fsencode(source), b'\xff\xfe')
    os.mkdir(folder)
    shutil.move(source/FIRST, os.path.join(os.fsdecode(folder), f'{IDS[0]}.jpg'))
    same_rows(d := prepared(source, tmp_path/'out'), good)
    assert len(d) == N
    with open(os.path.join(folder, f'{IDS[0]}.jpg'.encode()), 'wb') as f: f.write(b'damaged')
    with pytest.raises(ValueError, match=IDS[0]) as e: prepared(source, tmp_path/'other')
    str(e.value).encode()
    shutil.rmtree(source)


def test_folders_that_lead_in_a_circle(good, tmp_path):
    source = write(tmp_path/'source', GOOD)
    (source/'again').symlink_to(source)
    same_rows(prepared(source, tmp_path/'out'), good)


# --- sources that change

def touch(path, content):
    "New content with a time of change of its own, as any program that writes leaves it."
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def swapped():
    "Another image with as many bytes as the first."
    other = encoded(picture(77), quality=80)
    return other + bytes(len(GOOD[FIRST]) - len(other))


def test_source_that_changes_between_two_calls(tmp_path):
    source, dest = write(tmp_path/'source', GOOD), tmp_path/'out'
    before = prepared(source, dest)
    assert prepared(source, dest).sha256 == before.sha256
    touch(source/FIRST, GOOD[FIRST])
    assert prepared(source, dest).sha256 == before.sha256                      # copied again: another time, the same bytes
    touch(source/FIRST, swapped())
    with pytest.raises(FileExistsError, match=f'1 images changed since .*{IDS[0]}.*into another destination'): prepared(source, dest)
    assert open_dataset(dest, verify=True).sha256 == before.sha256
    assert (prepared(source, tmp_path/'other').images[0] != before.images[0]).any()


def test_zip_that_changes_between_two_calls(tmp_path):
    source = zipped(tmp_path/'all.zip', GOOD)
    before = prepared(source, tmp_path/'out')
    zipped(source, {**GOOD, FIRST: swapped()})
    with pytest.raises(FileExistsError, match=IDS[0]): prepared(source, tmp_path/'out')
    assert open_dataset(tmp_path/'out', verify=True).sha256 == before.sha256


@pytest.mark.parametrize('kind', ['folder', 'zip', 'pack'])
def test_source_that_changes_while_it_is_prepared(tmp_path, kind):
    "Same names, same sizes, other content between the listing and the decoding."
    images = {i: c for i, c in ((n.split('/')[1][:-4], c) for n, c in GOOD.items() if '/' in n)}
    if kind == 'folder':
        source, change = write(tmp_path/'source', GOOD), lambda: touch(tmp_path/'source'/FIRST, swapped())
    elif kind == 'zip':
        source, change = zipped(tmp_path/'all.zip', GOOD), lambda: (zipped(tmp_path/'all.zip', {**GOOD, FIRST: swapped()}), os.utime(tmp_path/'all.zip', ns=(1, 1)))
    else:
        source = write(tmp_path/'source', {'metadata.csv': GOOD['HAM10000_metadata.csv']})
        pack = source/'images_60x45.parquet'
        def packed(of): pd.DataFrame(dict(image_id=list(of), image=list(of.values()))).to_parquet(pack)
        packed(images)
        change = lambda: (packed({**images, IDS[0]: swapped()}), os.utime(pack, ns=(1, 1)))
    found = read_ham10000(source)
    change()
    with pytest.raises((ValueError, OSError), match='changed while it was read'): prepare_set(found, tmp_path/'out', size=8, progress=False)
    assert not (tmp_path/'out').exists()


# --- many mutations

def mutated(content, rng):
    "A few flipped bits, a cut, an insertion, zeros, or a part twice."
    content, n = bytearray(content), len(content)
    at, length = int(rng.integers(n)), int(rng.integers(1, 40))
    match rng.integers(5):
        case 0:
            for k in rng.integers(0, n, rng.integers(1, 6)): content[k] ^= 1 << int(rng.integers(8))
        case 1: del content[at:]
        case 2: content[at:at] = rng.bytes(length)
        case 3: content[at:at + length] = bytes(len(content[at:at + length]))
        case 4: content[at:at] = content[max(0, at - length):at]
    return bytes(content)


def touched_ids(before, after):
    "The images whose line of the table is not there any more as it was."
    return {i for i, line in zip(IDS, before.split(b'\n')[1:]) if line not in after.split(b'\n')}


@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('kind, times, expected', [('jpg', 150, {'whole', 'left_out'}), ('png', 80, {'whole', 'left_out'}), ('csv', 150, {'whole', 'refused'}), ('zip', 150, {'left_out', 'refused'})])
def test_mutations(good, tmp_path, kind, times, expected, monkeypatch):
    "Whatever bytes change: a clear error, or rows that are right; only what was touched may differ or be left out, and it is said."
    monkeypatch.setattr(atomic, 'sync', lambda path: None)
    rng, ends = np.random.default_rng([len(kind), times]), dict(refused=0, whole=0, left_out=0)
    plain = zipped(tmp_path/'plain.zip', GOOD).read_bytes()
    for k in range(times):
        here = tmp_path/f'{k}'
        if kind == 'zip':
            source, may_differ = here/'all.zip', set()
            write(here, {'all.zip': mutated(plain, rng)})
        else:
            name = str(rng.choice([n for n in GOOD if n.endswith(kind)]))
            files = {**GOOD, name: mutated(GOOD[name], rng)}
            source = write(here/'source', files)
            may_differ = {name.split('/')[-1][:-4]} if kind != 'csv' else touched_ids(GOOD[name], files[name])
        try: d = prepared(source, here/'out', damaged='leave_out')
        except (ValueError, OSError) as e:
            assert len(str(e)) > 20 and not (here/'out').exists(), (k, e)
            ends['refused'] += 1
        else:
            same_rows(d, good, may_differ)
            said = set(d.manifest['notes'].get('damaged', {}))
            assert set(IDS) - set(d.image_ids) == said and (said <= may_differ or kind == 'zip'), k
            ends['left_out' if said else 'whole'] += 1
        shutil.rmtree(here)
    assert {k for k, n in ends.items() if n} == expected, ends
