"""Which subjects a benchmark's own tables put together. Names and groupings only; must not know questions or scores.

C-Eval: `subject_mapping.json` of hkust-nlp/ceval (clinical_medicine, which it leaves open, is Other as in the paper's
table) and the eight subjects of C-Eval Hard (arXiv 2305.08322). CMMLU: `src/categories.py` of haonan-li/CMMLU (arXiv
2306.09212), its fine subcategories joined to the five that are reported; "China specific" overlaps with the others.
"""

_CEVAL_STEM = """computer_network operating_system computer_architecture college_programming college_physics
college_chemistry advanced_mathematics probability_and_statistics discrete_mathematics electrical_engineer
metrology_engineer high_school_mathematics high_school_physics high_school_chemistry high_school_biology
middle_school_mathematics middle_school_biology middle_school_physics middle_school_chemistry veterinary_medicine"""
_CEVAL_SOCIAL = """college_economics business_administration marxism mao_zedong_thought education_science
teacher_qualification high_school_politics high_school_geography middle_school_politics middle_school_geography"""
_CEVAL_HUMANITIES = """modern_chinese_history ideological_and_moral_cultivation logic law chinese_language_and_literature
art_studies professional_tour_guide legal_professional high_school_chinese high_school_history middle_school_history"""
_CEVAL_OTHER = """civil_servant sports_science plant_protection basic_medicine clinical_medicine urban_and_rural_planner
accountant fire_engineer environmental_impact_assessment_engineer tax_accountant physician"""
_CEVAL_HARD = """advanced_mathematics discrete_mathematics probability_and_statistics college_physics college_chemistry
high_school_mathematics high_school_physics high_school_chemistry"""

CEVAL = {
    "STEM": frozenset(_CEVAL_STEM.split()),
    "Social Science": frozenset(_CEVAL_SOCIAL.split()),
    "Humanities": frozenset(_CEVAL_HUMANITIES.split()),
    "Other": frozenset(_CEVAL_OTHER.split()),
    "Hard": frozenset(_CEVAL_HARD.split()),
}

_CMMLU_STEM = """anatomy astronomy college_actuarial_science college_engineering_hydrology college_mathematics
college_medical_statistics computer_science conceptual_physics electrical_engineering elementary_mathematics genetics
high_school_biology high_school_chemistry high_school_mathematics high_school_physics machine_learning virology"""
_CMMLU_HUMANITIES = """arts chinese_history chinese_literature college_law global_facts international_law jurisprudence
logical marxist_theory philosophy professional_law world_history world_religions"""
_CMMLU_SOCIAL = """ancient_chinese business_ethics chinese_civil_service_exam chinese_food_culture chinese_foreign_policy
chinese_teacher_qualification college_education economics education elementary_chinese ethnology high_school_geography
high_school_politics journalism management marketing modern_chinese professional_accounting professional_psychology
public_relations security_study sociology"""
_CMMLU_OTHER = """agronomy chinese_driving_rule clinical_knowledge college_medicine computer_security
construction_project_management elementary_commonsense elementary_information_and_technology food_science human_sexuality
legal_and_moral_basis nutrition professional_medicine sports_science traditional_chinese_medicine"""
_CMMLU_CHINA = """ancient_chinese chinese_civil_service_exam chinese_driving_rule chinese_food_culture
chinese_foreign_policy chinese_history chinese_literature chinese_teacher_qualification construction_project_management
elementary_chinese elementary_commonsense ethnology high_school_politics modern_chinese traditional_chinese_medicine"""

CMMLU = {
    "STEM": frozenset(_CMMLU_STEM.split()),
    "Humanities": frozenset(_CMMLU_HUMANITIES.split()),
    "Social Science": frozenset(_CMMLU_SOCIAL.split()),
    "Other": frozenset(_CMMLU_OTHER.split()),
    "China specific": frozenset(_CMMLU_CHINA.split()),
}
