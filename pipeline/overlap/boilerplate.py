"""Phrases that stand around many problems and say nothing of any: taken off test items, and never a match by themselves."""

from __future__ import annotations

BOILERPLATE = (
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "Let's think step by step and output the final answer within \\boxed{}.",
    "Let's think step by step and output the final answer after ####.",
    "Let's think step by step.",
    "Put your final answer within \\boxed{}.",
    "Please put your final answer within \\boxed{}.",
    "Remember to put your final answer within \\boxed{}.",
    "Return your final response within \\boxed{}.",
    "Solve the following math problem efficiently and clearly.",
    "Solve the following math problem step by step.",
    "The last line of your response should be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
    "problem.",
    "Answer the following multiple choice question.",
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one "
    "of ABCD.",
    "The following are multiple choice questions (with answers).",
    "Express your answer as a common fraction.",
    "Express your answer in simplest form.",
    "Round your answer to the nearest integer.",
    "Find the remainder when the result is divided by 1000.",
    "where m and n are relatively prime positive integers. Find m + n.",
    "where p and q are relatively prime positive integers. Find p + q.",
    "You will be given a problem. Write a Python program that solves it.",
    "Write a Python function that solves the following problem.",
    "Read the inputs from stdin, solve the problem and write the answer to stdout.",
)
