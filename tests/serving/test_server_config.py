"""Settings, and the config file for clusters."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from modeling_lavit.command_line import main
from modeling_lavit.serving.application import LavitServer, resources
from modeling_lavit.serving.engine import LavitEngine
from modeling_lavit.serving.settings import ServeSettings


CONFIG = Path(__file__).resolve().parent.parent.parent / "examples/serve_cluster.yaml"


def test_the_example_for_clusters_names_settings_and_deployments_that_there_are():
    config = yaml.safe_load(CONFIG.read_text())
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    settings = ServeSettings(**application["args"])
    names = {deployment["name"] for deployment in application["deployments"]}
    assert names == {LavitEngine.__name__, LavitServer.__name__}
    engine = next(one for one in application["deployments"] if one["name"] == LavitEngine.__name__)
    assert engine["max_ongoing_requests"] == 2 * settings.max_batch_size


@pytest.mark.parametrize(
    "wrong", [{"replicas": 0}, {"dtype": "int8"}, {"batch_size": 4}, {"api_key": " "}, {"max_queue": -1}]
)
def test_a_wrong_setting_is_refused_before_anything_starts(wrong):
    with pytest.raises(ValidationError):
        ServeSettings(**wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api-key", ""], "api_key is empty"),
        (["--port", "70000"], "--port is at most 65535"),
        (["--device", "cuda:1"], "each replica gets a GPU of its own"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(options, message, capfd, monkeypatch):
    monkeypatch.delenv("LAVIT_API_KEY", raising=False)
    assert main(["serve", *options]) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(("replicas", "cores"), [(1, 2), (2, 1), (4, 0.5)])
def test_replicas_share_the_cores_and_never_ask_for_more(replicas, cores, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert resources(ServeSettings(device="cpu", replicas=replicas)) == {"num_cpus": cores}


def test_the_key_comes_from_the_environment_and_the_model_has_the_name_of_its_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LAVIT_API_KEY", "secret")
    assert ServeSettings().api_key == "secret"
    assert ServeSettings().served_name == "lavit-emoji"
    assert ServeSettings(model=str(tmp_path)).served_name == tmp_path.name
    assert ServeSettings(model="organisation/checkpoint").served_name == "organisation/checkpoint"
