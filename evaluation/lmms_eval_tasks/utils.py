"""Documents of lmms-eval's own tasks, with the paper's prompts: `--include_path` this folder's."""

from lmms_eval.tasks.coco_cap import utils as coco
from lmms_eval.tasks.flickr30k import utils as flickr30k
from lmms_eval.tasks.gqa import utils as gqa
from lmms_eval.tasks.nocaps import utils as nocaps
from lmms_eval.tasks.ok_vqa import utils as ok_vqa
from lmms_eval.tasks.vizwiz_vqa import utils as vizwiz
from lmms_eval.tasks.vqav2 import utils as vqav2


coco_doc_to_visual, coco_process_result = coco.coco_doc_to_visual_karpathy, coco.coco_process_result_karpathy
coco_cider = coco.coco_cider
flickr_doc_to_visual, flickr_process_result = flickr30k.flickr_doc_to_visual, flickr30k.flickr_process_result
flickr_cider = flickr30k.flickr_cider
gqa_process_docs, gqa_doc_to_visual = gqa.gqa_process_docs, gqa.gqa_doc_to_visual
nocaps_doc_to_visual, nocaps_process_result = nocaps.nocaps_doc_to_visual, nocaps.nocaps_process_result
nocaps_cider = nocaps.nocaps_cider
ok_vqa_doc_to_visual, ok_vqa_process_results = ok_vqa.ok_vqa_doc_to_visual, ok_vqa.ok_vqa_process_results
vizwiz_vqa_doc_to_visual, vizwiz_vqa_process_results = (
    vizwiz.vizwiz_vqa_doc_to_visual,
    vizwiz.vizwiz_vqa_process_results,
)
vqav2_doc_to_visual, vqav2_process_results = vqav2.vqav2_doc_to_visual, vqav2.vqav2_process_results_val


def caption_prompt(doc, lmms_eval_specific_kwargs=None) -> str:
    """Captions follow the image alone (paper, section 4.1)."""
    return ""


def question_prompt(doc, lmms_eval_specific_kwargs=None) -> str:
    """The paper's prompt; the chat class gives the template the question alone, which writes the same."""
    return f"Question: {doc['question']} Answer:"
