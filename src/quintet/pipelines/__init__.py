"""`pipeline(task)`: from text to an answer in one call; one file a task."""

from quintet.pipelines.base import Pipeline
from quintet.pipelines.factory import pipeline
from quintet.pipelines.feature_extraction import FeatureExtractionPipeline
from quintet.pipelines.question_answering import QuestionAnsweringPipeline
from quintet.pipelines.text_classification import TextClassificationPipeline
from quintet.pipelines.text_generation import TextGenerationPipeline
from quintet.pipelines.token_classification import TokenClassificationPipeline
from quintet.pipelines.zero_shot_classification import ZeroShotClassificationPipeline

__all__ = [
    "FeatureExtractionPipeline",
    "Pipeline",
    "QuestionAnsweringPipeline",
    "TextClassificationPipeline",
    "TextGenerationPipeline",
    "TokenClassificationPipeline",
    "ZeroShotClassificationPipeline",
    "pipeline",
]
