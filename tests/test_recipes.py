"""Recipes: the published numbers, what overrides them, and what is written down about it."""

import dataclasses
import json

import pytest

from llamagen_unitok.training.dry_run import IMAGENET as IMAGENET_CODES
from llamagen_unitok.training.generator import GeneratorTraining
from llamagen_unitok.training.loop import LoopConfig
from llamagen_unitok.training.recipes import RECIPES, Plan, count_steps, describe, resolve

SETTINGS = (GeneratorTraining, LoopConfig)
IMAGENET = 1_281_167
FIXED = ("unitok-cfgfree", 1)  # the recipe of a depth head says how deep it is


def resolved(pictures: int = IMAGENET, views: int = 10, **given):
    flags = {f.name: f.default for kind in (*SETTINGS, Plan) for f in dataclasses.fields(kind)} | given
    return count_steps(resolve(flags, given, SETTINGS), pictures, views)


def test_the_cfg_free_recipe_is_the_published_one():
    # UniTok's training script and arXiv 2502.20321: 300 epochs at 1,024 are about 375 k steps, 3 % of them warm-up.
    run = resolved(recipe="unitok-cfgfree", codes="codes")
    loop, training = run.take(LoopConfig), run.take(GeneratorTraining)
    assert loop.steps == 375_342 and loop.warmup_steps == 11_260
    assert (loop.batch_size, loop.lr, loop.lr_schedule) == (1024, 3e-4, "cosine")
    assert (loop.beta1, loop.beta2, loop.weight_decay, loop.grad_clip) == (0.9, 0.95, 0.05, 1.0)
    assert (training.model, training.depth_layers, training.class_dropout, training.dropout) == ("XXL", 4, 0.0, 0.1)
    assert not run.differs


def test_the_llamagen_recipe_is_the_published_one():
    run = resolved(recipe="llamagen", codes="codes")
    loop, training = run.take(LoopConfig), run.take(GeneratorTraining)
    assert (loop.batch_size, loop.lr, loop.lr_schedule, loop.warmup_steps) == (256, 1e-4, "constant", 0)
    assert loop.steps == 1_501_368
    assert (training.class_dropout, training.dropout, loop.weight_decay) == (0.1, 0.1, 0.05)
    assert (loop.beta1, loop.beta2, loop.grad_clip, loop.ema) == (0.9, 0.95, 1.0, 0.0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_sets_only_settings_that_exist(name):
    run = resolved(recipe=name, codes="codes")
    assert all(run.values[key] == value for key, value in RECIPES[name].values.items())


def test_flags_override_the_recipe_and_the_difference_is_said():
    run = resolved(recipe="unitok-cfgfree", codes="codes", lr=1e-3, steps=50, views=1)
    assert run.values["lr"] == 1e-3 and run.values["steps"] == 50
    assert run.values["warmup_steps"] == 2 and run.values["batch_size"] == 1024
    assert run.differs == {"lr": (3e-4, 1e-3), "epochs": (300, None), "views of each picture": (10, 1)}
    assert "lr 0.001 instead of 0.0003" in describe(run)
    assert "followed in every setting" in describe(resolved(recipe="llamagen", codes="codes"))


def test_a_flag_that_repeats_the_default_still_overrides_the_recipe():
    assert resolved(recipe="unitok-cfgfree", class_dropout=0.1).values["class_dropout"] == 0.1


def test_epochs_become_steps_without_a_recipe():
    assert resolved(pictures=1000, epochs=2.5, batch_size=100).values["steps"] == 25
    assert resolved(pictures=10, epochs=1, batch_size=100).values["steps"] == 1


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ('{"lr": 1e-3, "leaning_rate": 2}', r"unknown settings \['leaning_rate'\]"),
        ('{"recipe": "llamagen"}', r"unknown settings \['recipe'\]"),
        ('{"lr": "fast"}', "lr must be float, not 'fast'"),
        ('{"batch_size": 2.5}', "batch_size must be int, not 2.5"),
        ('{"steps": true}', "steps must be int, not True"),
        ('{"steps": 5, "epochs": 2}', "sets steps and epochs, which say the same"),
        ('{"warmup_steps": 5, "warmup_share": 0.1}', "sets warmup_steps and warmup_share, which say the same"),
        ("[1]", "must hold one JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_recipe_file_is_checked(tmp_path, contents, message):
    path = tmp_path / "mine.json"
    path.write_text(contents)
    with pytest.raises(ValueError, match=message):
        resolved(recipe=str(path))


def test_a_recipe_file_counts_like_a_row(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"lr": 1, "epochs": 2, "layers": 3, "codes": "here"}))
    run = resolved(pictures=512, recipe=str(path), batch_size=64)
    assert run.values["steps"] == 16 and run.values["layers"] == 3 and not run.differs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "lamagen"}, "--recipe lamagen is not known"),
        ({"recipe": "mine.json"}, "there is no such file"),
        ({"epochs": 1.0, "steps": 5}, "--steps and --epochs say the same"),
        ({"warmup_share": 0.1, "warmup_steps": 5}, "--warmup-steps and --warmup-share say the same"),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        resolved(**given)


@pytest.mark.parametrize("changes", [{"epochs": 0.0}, {"warmup_share": 1.0}])
def test_a_plan_checks_its_numbers(changes):
    with pytest.raises(ValueError, match="--"):
        Plan(**changes)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("codebooks", [1, 8])
def test_every_recipe_makes_a_generator_of_codes_with_one_codebook_or_several(recipe, codebooks):
    meta = dataclasses.replace(IMAGENET_CODES, num_codebooks=codebooks)
    training = resolved(recipe=recipe, codes="codes", **({"depth_layers": 0} if (recipe, codebooks) == FIXED else {}))
    config = training.take(GeneratorTraining).architecture_for(meta)
    assert config.depth_layers == (4 if codebooks > 1 else 0)
