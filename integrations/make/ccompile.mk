# Compile ONNX models in a Makefile (GNU make): include this file, then ask for $(CCOMPILE_OUT)/NAME.onnx.
#
#   CCOMPILE_MODELS/NAME.onnx + CCOMPILE_SPECS/NAME.yaml -> CCOMPILE_OUT/NAME.onnx
#
# A model is compiled again when the model, the spec, its data, its target or a metric's source changed: what was read
# stands in NAME.onnx.d. When a contract or gate breaks, make stops, and the previous result stays. `make -j` compiles
# several models at a time.

CCOMPILE        ?= ccompile
CCOMPILE_FLAGS  ?= -q
CCOMPILE_MODELS ?= models
CCOMPILE_SPECS  ?= specs
CCOMPILE_OUT    ?= build

$(CCOMPILE_OUT)/%.onnx: $(CCOMPILE_MODELS)/%.onnx $(CCOMPILE_SPECS)/%.yaml
	@mkdir -p $(@D)
	$(CCOMPILE) '$(CCOMPILE_MODELS)/$*.onnx' -s '$(CCOMPILE_SPECS)/$*.yaml' -o '$@' --depfile '$@.d' $(CCOMPILE_FLAGS)

-include $(wildcard $(CCOMPILE_OUT)/*.onnx.d)
