"""Tables say what was measured and no more, verdicts follow their rule, and no model text is ever interpreted."""
import html
import html.parser
import re

import numpy as np
import pandas as pd
import pytest

from mapo.agents import escape, printable
from mapo.tables import (arm_label, arm_style, arms, average_diversity, base_arms, choose_rates, claims_table,
                         comparisons_table, flag_failures,
                         flag_selection, flips_table, formatted, markdown, readouts_table, results_table, save_table,
                         show_pairs, show_table, sweep_table)
from written import (costs, debates, everything, hostile, manifest, rows, team,  # noqa: F401 fixtures among them
                     teams, trees)


class Text(html.parser.HTMLParser):
    "Collects the tags a browser would see, and the text."
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.words = set(), ''
    def handle_starttag(self, tag, attrs): self.tags |= {tag, *(name for name, _ in attrs if name.startswith('on'))}
    def handle_data(self, data): self.words += data


@pytest.mark.parametrize('text', hostile)
def test_model_text_is_never_interpreted(text):
    say = lambda role: [dict(role=role, content=text)]
    shown = show_pairs(pd.DataFrame([dict(prompt=say('user'), chosen=say('assistant'), rejected=say('assistant'),
                                          problem_id=text, agent=text, chosen_agent=text, rejected_agent=text)]))
    page = Text()
    page.feed(shown.html)
    page.close()
    assert page.tags == {'div', 'pre', 'b'}
    assert page.words.count(printable(text)) == 7
    for c in '$*`|_\n#': assert c not in escape(text).replace('&#', '')
    for c in '\x1b\x00\x07\u202e\r': assert c not in repr(shown) and c not in shown.html
    escape('\ud800').encode('utf-8')
    table = show_table(pd.DataFrame(dict(claim=[text])), 'fixed-id', note=text)
    page = Text()
    page.feed(table.html)
    assert page.tags == {'div', 'table', 'thead', 'tbody', 'tr', 'th', 'td',
                         'p'} and '<table id="fixed&#45;id">' in table.html
    cells = markdown(formatted(pd.DataFrame(dict(claim=[text])))).splitlines()
    assert len(cells) == 3 and not re.search(r'(?<!\\)[*_$`<]', cells[2])


def test_endless_text_is_cut_and_says_so():
    say = lambda text: [dict(role='assistant', content=text)]
    shown = show_pairs(pd.DataFrame([dict(prompt=say('q'), chosen=say('x'*2_000_000), rejected=say(''), problem_id='p',
                                          agent='a', chosen_agent='a', rejected_agent='b')]))
    assert '2,000,000 characters' in html.unescape(shown.html) and '2,000,000 characters' in repr(shown)
    assert len(shown.html) < 10_000
    assert repr(show_pairs(pd.DataFrame())) == 'no pairs'


def test_edges_are_tables(rows, tmp_path):
    none = flag_failures(rows[rows.arm == 'base'])
    assert none.empty and markdown(formatted(none)).startswith('| arm |')
    assert 'greedy' not in results_table(rows.assign(greedy=np.nan))
    save_table(results_table(rows), tmp_path, 'no_costs')


def test_failures_are_found_by_name(rows):
    flags = flag_failures(rows).set_index(['arm', 'failure', 'agent'])
    assert flags.loc[('dpo', 'falls after iteration 1', 'team'), 'difference'] < -.1
    assert flags.loc[('dpo', 'agent below its base', 'b'), 'difference'] < -.15
    assert not any('falls' in f or 'below' in f for a, f, _ in flags.index if a == 'mars_po')


def test_a_claim_needs_its_arms_and_more_than_one_seed(rows):
    claim = lambda **of: dict(paper='none', refuted_if='worse') | of
    claims = [claim(claim='without NLL', tests=[['mars_po', 'mars_po_no_nll']]),
              claim(claim='rises', tests=[['mars_po@2', 'mars_po@1'], ['mars_po@9', 'mars_po@1']])]
    one, rises, _ = claims_table(claims, rows).verdict
    assert one == 'not testable here: this run has no Mars-PO without NLL'
    assert rises == 'not testable here: this run has no Mars-PO, iteration 9'
    one = claims_table(manifest['claims'], rows[rows.seed == 0], manifest['comparisons'])
    assert [*one.verdict] == ['undecided: these checkpoints only'] and one.p_holm[0] < .05


def test_a_claim_of_several_tests_holds_only_whole():
    levels = {0: dict(a=.5, b=.5)}
    rows = pd.concat([team('base', levels, seeds=range(6)), team('mars_po', {1: dict(a=.8, b=.2)}, seeds=range(6)),
                      team('dpo', {1: dict(a=.8, b=.8)}, seeds=range(6))])
    claim = lambda arm: dict(claim=f'both gain under {arm}', paper='none', refuted_if='one loses',
                             tests=[[f'{arm}:{n}', f'base:{n}'] for n in 'ab'])
    judged = claims_table([claim('mars_po'), claim('dpo')], rows)
    assert [*judged.verdict] == ['fails']*2 + ['holds']*2
    assert {*judged.family} == {'further'}
    with_primary = claims_table([claim('dpo')], rows, [('dpo:a', 'base:a')])
    # two families of one test, no family of four
    assert [*with_primary.family] == ['primary', 'further'] and with_primary.p_holm[1] < judged.p_holm[3]


def drawn(differences, seeds=3, problems=50):
    "Compact rows of arms `a` and `b` whose sampled and greedy accuracy differ by what is given, seed by seed."
    share = lambda arm, metric, s: .5 + (differences[metric][s] if arm == 'a' else 0)
    row = lambda arm, s, i: dict(arm=arm, seed=s, iteration=int(arm == 'a'), agent='team', problem_id=f'p{i:02}', n=100,
                                 c=round(100*share(arm, 'sampled', s)),
                                 greedy=float(i < problems*share(arm, 'greedy', s)))
    return pd.DataFrame([row(arm, s, i) for arm in 'ab' for s in range(seeds) for i in range(problems)])


@pytest.mark.parametrize('sampled, greedy, verdict', [
    ([.1, .11, .12], [.1, .12, .14], 'holds'),
    ([-.1, -.11, -.12], [-.1, -.12, -.14], 'fails'),
    ([-.1, .1, .05], [.1, -.1, .02], 'undecided'),
    ([-.1, -.11, -.12], [.1, -.1, .02], 'fails sampled, undecided greedy'),
    ([.1, .11, .12], [-.1, -.12, -.14], 'holds sampled, fails greedy')])
def test_a_verdict_is_of_sampled_and_of_greedy_answers(sampled, greedy, verdict):
    claims = [dict(claim='better', paper='none', refuted_if='worse', tests=[['a', 'b']])]
    assert claims_table(claims, drawn(dict(sampled=sampled, greedy=greedy))).verdict[0] == verdict


def test_a_loss_is_not_hidden_behind_the_number_of_tests():
    "A loss that is undecided among all tests fails its own claim; a gain of the same size does not make one hold."
    rows = drawn(dict(sampled=[-.05, -.1, -.07], greedy=[0, 0, 0])).assign(greedy=np.nan)
    more = pd.concat([rows, *(rows[rows.arm == 'a'].assign(arm=f'a{i}') for i in range(9))], ignore_index=True)
    claim = lambda *test: dict(claim=f'{test}', paper='none', refuted_if='worse', tests=[[*test]])
    judged = claims_table([claim('a', 'b'), claim('b', 'a1'), *(claim(f'a{i}', 'b') for i in range(9))], more)
    assert (judged.p_holm > .05).all() and judged.verdict[0] == 'fails' and judged.verdict[1] == 'undecided'


def test_a_claim_says_what_counts_against_it_and_whether_its_control_was_trained(rows):
    both = dict(claim='both', paper='none', refuted_if='worse', tests=[['mars_po', 'dpo'], ['mars_po', 'base']])
    judged = claims_table([both], rows)
    assert [*judged.control] == ['trained', 'untrained'] and [*judged.refuted_if] == ['worse']*2
    with pytest.raises(ValueError, match="claim 'idle' does not say what would count against it"):
        claims_table([dict(claim='idle', paper='none', tests=[['mars_po', 'dpo']])], rows)


def test_a_reason_stands_where_a_claim_cannot_be_tested(rows):
    claim = dict(claim='rises', paper='none', refuted_if='falls', tests=[['mars_po', 'base']])
    judged = claims_table([claim | dict(untestable='nothing was learnt')], rows)
    assert judged.verdict[0] == 'not testable here: nothing was learnt' and judged.difference.notna().all()
    itself = claims_table([claim | dict(tests=[['mars_po', 'mars_po@2']])], rows).verdict[0]
    assert itself == 'not testable here: Mars-PO and Mars-PO, iteration 2 are the same here'


def test_no_comparison_holds_an_arm_against_itself(rows):
    for pair in (('mars_po', 'mars_po'), ('mars_po', 'mars_po@2'), ('base:a', 'base@0:a')):
        with pytest.raises(ValueError, match='an arm is not held against itself'): comparisons_table(rows, [pair])


def test_controls_that_came_afterwards_are_marked_and_corrected_by_themselves(rows):
    table = comparisons_table(rows, [('mars_po', 'dpo')], [('mars_po', 'base'), ('dpo', 'base')])
    assert [*table.named] == ['beforehand', 'afterwards', 'afterwards'] and table.p_holm[0] == table.p[0]
    assert 'named' not in comparisons_table(rows, [('mars_po', 'dpo')])
    assert {'greedy', 'greedy_low', 'greedy_p_holm'} <= {*table}
    assert 'greedy' not in comparisons_table(rows.assign(greedy=np.nan), [('mars_po', 'dpo')])


def test_each_team_is_held_against_its_own_base(everything):
    rows = everything['rows']
    few = rows[rows.arm.isin(['base', 'base_same', 'mars_po', 'mars_po_same', 'dpo_nll_same'])]
    lower = few.assign(c=few.c.where(~few.arm.str.endswith('_same'), few.c*(few.arm == 'base_same')))
    flags = flag_failures(lower).query("failure == 'agent below its base' and clear")
    assert {*flags.arm} == {'dpo_nll_same', 'mars_po_same'} and {*flags.agent} == {'same-0', 'same-1', 'same-2'}


def test_bias_of_a_selection_is_named_and_chance_is_not():
    rng, named = np.random.default_rng(3), []
    for run in range(120):
        weights = rng.normal(100, 5, (5, 3, 3))
        table = pd.DataFrame([dict(arm='mars_po', seed=s, iteration=t, source_agent=a, candidates=100.,
                                   selected=weights[s, t, i], candidate_tokens=20.,
                                   selected_tokens=20 + rng.normal(0, .5)) for s in range(5) for t in range(3)
                              for i, a in enumerate('abc')])
        named.append(str(flag_selection(table).failure[0]))
    assert .01 < np.mean(['length' in n for n in named]) < .11  # .05, one standard error .02
    assert np.mean(['source agent' in n for n in named]) < .08
    biased = table.assign(selected=table.selected*np.where(table.source_agent == 'b', 1.4, 1),
                          selected_tokens=table.selected_tokens + 3)
    row = flag_selection(biased).iloc[0]
    assert row.failure == 'length, source agent' and row.source_agent == 'b' and abs(row.longer - 3) < .6
    with pytest.raises(ValueError, match='there twice'): flag_selection(pd.concat([table, table]))
    with pytest.raises(ValueError, match="no column 'selected'"): flag_selection(table.drop(columns='selected'))


def test_a_source_that_is_never_chosen_is_no_gap(everything):
    table = everything['selection'].query("arm == 'mars_po_same'")
    none = table.assign(selected=table.selected.where(table.source_agent != 'same-0', 0))
    row = flag_selection(none).iloc[0]
    assert np.isfinite([row.longer, row.favoured]).all() and row.source_agent != 'same-0'


def test_grids_of_unequal_size_are_refused(everything):
    with pytest.raises(ValueError, match='as many learning rates'): choose_rates(everything['rates'][1:])
    chosen = choose_rates(everything['rates'])
    assert {*chosen.learning_rate} == {3e-5} and chosen.edge.isna().all() and {*chosen.ties} == {'1e-5'}
    assert {*chosen.grid} == {3}


def test_names_have_one_look_each():
    assert len({str(arm_style(a)) for a in arms}) == len({arm_label(a) for a in arms}) == len(arms)
    assert arm_style('never_seen') == arm_style('never_seen')


def test_the_untrained_arm_a_debate_began_as(debates):
    base = base_arms(debates['rows'], dict(bases=dict(multiagent_ft='debate', single_agent='debate')))
    assert base['multiagent_ft'] == 'debate' and base['star'] == base['debate'] == base['base'] == 'base'
    with pytest.raises(ValueError, match="bases name arm 'nobody'"):
        base_arms(debates['rows'], dict(bases=dict(star='nobody')))


def test_a_team_has_one_column(debates, trees):
    for rows in (debates['rows'], trees['rows']):
        assert [*results_table(rows).columns] == ['arm', 'iteration', 'team', 'team_low', 'team_high', 'seeds']
    mixed = results_table(pd.concat([team('base', {0: dict(a=.5, b=.5)}), teams(dict(debate={0: .6}))]))
    assert 'other_agents' not in mixed and mixed.columns.is_unique


def test_a_team_below_its_base_is_named(trees):
    rows = trees['rows']
    few = rows[rows.arm.isin(['sa', 'ma', 'malt'])]
    worse = few.assign(c=few.c.where(few.arm != 'malt', 0))
    flags = flag_failures(worse)
    assert flags.query("arm == 'malt' and failure == 'below its base' and agent == "
                       "'team'").clear.all() and 'malt' in set(flags.arm) and 'sa' not in set(flags.arm)
    assert base_arms(rows) == dict.fromkeys(rows.arm, 'sa')


def test_one_seed_keeps_its_interval_and_several_widen_it(debates):
    table = debates['diversity']
    keys = ['arm', 'iteration', 'round', 'measure']
    one = average_diversity(table[table.seed == 0]).set_index(keys)
    assert (one[['low', 'high']]
            == table[table.seed
                     == 0].set_index(keys)[['low', 'high']].reindex(one.index)).all(axis=None) and {*one.seeds} == {1}
    rng = np.random.default_rng(0)
    truth, covered = .5, []
    for _ in range(400):  # 5 seeds, 200 problems: the mean over seeds of a measure whose seeds differ
        problems, seeds = rng.normal(truth, .3, 200), rng.normal(0, .02, 5)
        values = problems + seeds[:, None] + rng.normal(0, .1, (5, 200))
        run = pd.DataFrame([dict(arm='a', seed=s, iteration=1, measure='nll', round=1, mean=v.mean(), low=0, high=1,
                                 se=v.std(ddof=1)/200**.5, problems=200) for s, v in enumerate(values)])
        row = average_diversity(run).iloc[0]
        covered.append(row.low <= truth <= row.high)
    assert .93 < np.mean(covered) < 1
    wide = average_diversity(pd.DataFrame([dict(arm='a', seed=s, iteration=0, measure='consensus', round=0, mean=.98,
                                                low=.9, high=1, se=.05, problems=60) for s in (0, 1)])).iloc[0]
    assert wide.high == 1 and wide.low < .9


def test_readouts_and_flips_stand_in_their_order(debates, trees):
    assert [*readouts_table(debates['readouts']).columns[[2, 5, 8]]] == ['alone', 'vote', 'debate']
    assert [*readouts_table(trees['readouts']).columns[[2, 5, 8, 11]]] == [
        'after generator', 'after verifier', 'after refiner', 'vote']
    assert [*flips_table(trees['flips']).arm[:4]] == ['sa', 'sa_vote', 'sa_vote_nine', 'ma']


def test_swept_words_and_numbers_have_an_order(trees):
    words = pd.DataFrame([dict(setting='order', value=v, arm='malt', accuracy=.6, low=.5, high=.7)
                          for v in ('b', 'c', 'a')])
    both = sweep_table(pd.concat([words, trees['sweep'].query("setting == 'threshold'").astype(dict(value=str))]))
    assert [*both.value] == ['a', 'b', 'c'] + ['0.3']*3 + ['0.5']*3 + ['0.7']*3
    assert [*both.arm[3:6]] == ['star_ma', 'malt_one', 'malt']
