"""Reading a recipe: overrides, round trip, and every problem named at once."""

import pytest

from megatron_steel import recipe as r
from megatron_steel.errors import EXIT_BAD_INPUT, SteelError


def _problems(*overrides: str) -> str:
    with pytest.raises(SteelError) as caught:
        r.load_recipe("tiny", overrides)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    return str(caught.value)


def test_numbers_as_people_write_them():
    recipe = r.load_recipe("tiny", ["optim.lr=3e-4", "train.tokens=1e9", "optim.eps=1E-8"])
    assert (recipe.optim.lr, recipe.train.tokens, recipe.optim.eps) == (3e-4, 10**9, 1e-8)


def test_an_override_of_an_exclusive_key_replaces_the_recipes():
    recipe = r.load_recipe("tiny", ["train.epochs=2"])
    assert (recipe.train.steps, recipe.train.epochs) == (None, 2)
    recipe = r.load_recipe("tiny", ["model.path=somewhere"])
    assert (recipe.model.type, recipe.model.config, recipe.model.path) == (None, {}, "somewhere")


def test_the_last_of_one_key_wins():
    assert r.load_recipe("tiny", ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize("name", r.recipe_names())
def test_a_resolved_recipe_reads_back_as_itself(name):
    recipe = r.load_recipe(name)
    assert r.from_dict(recipe.to_dict()) == recipe
    assert recipe.run.dir == f"runs/{name}"


def test_unknown_keys_wrong_types_and_conflicts_come_in_one_message():
    text = _problems("optim.lrr=1", "train.token=3", "train.global_batch_size=1.5", "data.sequence_length=many")
    assert "optim.lrr: unknown key; did you mean optim.lr?" in text
    assert "train.token: unknown key; did you mean train.tokens?" in text
    assert "train.global_batch_size: Input should be a valid integer" in text
    assert "data.sequence_length: Input should be a valid integer" in text


def test_unknown_keys_inside_a_list_are_named():
    assert "data.train.0.weigt: unknown key; did you mean data.train.weight?" in _problems(
        "data.train=[{prefix: a, weigt: 2}]"
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lr=.nan", "optim.lr: nan must be above 0"),
        ("train.epochs=.inf", "train.epochs: inf must be above 0"),
        ("optim.lr=0", "optim.lr: 0.0 must be above 0"),
        ("train.micro_batch_size=-1", "train.micro_batch_size: -1 must be above 0"),
        ("schedule.min_lr_ratio=2", "schedule.min_lr_ratio: 2.0 is not between 0 and 1"),
        ("optim.betas=[0.9, 1]", "optim.betas: [0.9, 1.0] are not both in [0, 1)"),
        ("train.keep_every_steps=150", "train.keep_every_steps: 150 is no multiple of train.save_every_steps (100)"),
        ("data.train=[]", "data.train: the list is empty"),
        ("data.train=[{prefix: a, weight: 1}, {prefix: b}]", "give every prefix a weight, or none"),
        ("data.train=[{prefix: a, weight: 0}]", "weight 0.0 must be above 0"),
        ("train.steps=null", "exactly one of train.steps, train.tokens, train.epochs is needed"),
        ("optim.kernel=fast", "optim.kernel: Input should be 'auto', 'apex', 'deepspeed' or 'torch'"),
        ("--optim.lr=1", "is not an override"),
        ("optim.lr", "is not an override"),
        ("optim.betas=[1", "is not YAML"),
    ],
)
def test_impossible_values(override, says):
    assert says in _problems(override)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(SteelError, match="did you mean steel-1b"):
        r.load_recipe("steel1b")


def test_broken_yaml_names_the_file(tmp_path):
    (tmp_path / "x.yaml").write_text("run: [", encoding="utf-8")
    with pytest.raises(SteelError, match="not YAML") as caught:
        r.load_recipe(str(tmp_path / "x.yaml"))
    assert caught.value.where == str(tmp_path / "x.yaml")


def test_batch_arithmetic():
    train = r.load_recipe("tiny", ["train.global_batch_size=24", "train.micro_batch_size=4"]).train
    assert [r.accumulation_steps(train, world) for world in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(SteelError, match="24 samples cannot be cut into micro-batches of 4 on 4 ranks") as caught:
        r.accumulation_steps(train, 4)
    assert caught.value.remedy == "train.micro_batch_size=3 fits"


def test_the_option_surface_grows_only_on_purpose():
    assert len(r.known_keys()) == 69, "a new key needs a reason; then change this number"
