"""Every data set has a card whose numbers hold and whose croissant.json is valid, and is what the card gives."""
import json, re, socket
import pytest
from dal_med.data.card_facts import CARDS, NUMBER, PIXEL_FACTS, card_path, check_card, loose_numbers, read_card, sections
from dal_med.data.croissant import CONFORMS_TO, RAI, check_files, croissant, validated

HEADINGS = ('Dataset details', 'Dataset description', 'Dataset sources', 'Facts', 'Uses', 'Direct use', 'Must not be used for', 'Dataset structure', 'Dataset creation', 'Curation rationale', 'Data collection', 'Devices',
            'Preprocessing', 'Labels', 'Who labelled', 'Personal and sensitive information', 'Consent and ethics approval', 'Bias, risks and limitations', 'Skin tones', 'Biases', 'Missing data',
            'Known leaks and errors', 'Recommendations', 'Licence and access', 'Maintenance', 'Citation')

@pytest.mark.parametrize('name', CARDS)
def test_card_is_complete(name):
    text = sections(card_path(name))
    assert [h for h in HEADINGS if h not in text] == []
    parents = ('Dataset details', 'Uses', 'Dataset creation', 'Bias, risks and limitations')
    assert [h for h in HEADINGS if h not in parents and not text[h]] == []
    assert len(read_card(card_path(name))) >= 10
    assert loose_numbers(card_path(name)) == []

@pytest.mark.parametrize('name', CARDS)
def test_facts_hold(name): # those of pixels are checked in nbs/analysis/data_cards.ipynb
    found = check_card(name, skip=PIXEL_FACTS)
    assert found[found.verdict == 'DIFFERS'].why.tolist() == []
    assert (check_files(name).verdict != 'DIFFERS').all()

def test_absent_data_is_no_error(tmp_path):
    for name in CARDS:
        verdicts = set(check_card(name, tmp_path).verdict) | set(check_files(name, tmp_path).verdict)
        assert 'DIFFERS' not in verdicts and (verdicts != {'holds'} or name in ('phantom', 'synthetic'))

@pytest.mark.parametrize('name', CARDS)
def test_croissant_is_valid_and_made_from_its_card(name, monkeypatch):
    pytest.importorskip('mlcroissant', reason='mlcroissant is not installed: pip install "dal_med[cards]"')
    def no_network(*_, **__): raise OSError('no network in this test')
    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    monkeypatch.setattr(socket.socket, 'connect', no_network)
    file, made = card_path(name).with_name('croissant.json'), croissant(card_path(name))
    written = json.loads(file.read_text(encoding='utf-8'))
    assert written == json.loads(json.dumps(made))
    assert set(CONFORMS_TO) == set(written['conformsTo']) and all(written[f'rai:{k}'] for k in RAI)
    validated(file)

def test_list_of_cards_names_each_and_its_numbers():
    table = (card_path('ham10000').parents[1]/'README.md').read_text(encoding='utf-8')
    for name in CARDS: assert f']({name}/README.md)' in table
    stated = {n for name in CARDS for value in read_card(card_path(name)).stated for n in NUMBER.findall(value)}
    classes = {'6', '8'} # of PAD-UFES-20 and of ISIC 2019
    text = re.sub(r'`[^`]*`|\([^)]*\)|CC BY[-A-Z]* \d\.\d|ISIC 2019|Apache-2\.0', '', table)
    assert [n for n in NUMBER.findall(text) if n.rstrip(',') not in stated | classes] == []
