// prototype_cam and class_prototypes: what a backend is asked to do, in three steps: seeds from a CAM, levels
// of features resized side by side, prototypes and cosines.
//
// Features lie image by image as [channels][pixels] or, channels_last, as [pixels][channels]. What is called
// wide is float or, for double, double.
#pragma once

#include "dtype.h"

namespace wsss::prototype {

// The class that each pixel belongs to, or -1: the nearest pixel of the cam has its largest number there (the
// first of equal ones, or the first NaN), it is valid and the class is tagged.
struct SeedParams {
    DType dtype;  // of the cam
    int64_t images, classes;
    int64_t cam_height, cam_width;
    int64_t height, width;  // of the seeds
    const void* cam;        // [images][classes][cam_height][cam_width]
    Strides strides;
    const bool* tags;   // [images][classes]
    const bool* valid;  // [images][cam_height][cam_width]; or null
    double background_scale;
    int16_t* seeds;  // [images][height][width]
};
WSSS_OPERATION(find_seeds, SeedParams)

// A level of features, resized bilinearly; if `normalise`, after each pixel was divided by (its norm over
// channels + kNormEpsilon).
constexpr double kNormEpsilon = 1e-5;

struct LevelParams {
    DType dtype;
    int64_t images, channels;
    int64_t height, width;          // of the level
    int64_t out_height, out_width;  // of the resized features
    bool normalise;
    const void* level;  // [images][channels][height][width]
    Strides strides;

    void* resized;  // written by the forward; [images][channels][out_height][out_width]
    const void* resized_gradient;
    Strides resized_strides;  // of whichever of the two is there

    void* level_gradient;
    Strides gradient_strides;
};
WSSS_OPERATION(resize_level, LevelParams)
WSSS_OPERATION(differentiate_level, LevelParams)

// What keeps cosines of tiny vectors finite, as in torch.nn.functional.cosine_similarity.
constexpr double kCosineEpsilon = 1e-8;

struct Params {
    DType dtype;
    int64_t images, classes, channels, pixels;
    bool channels_last;
    const void* features;
    int64_t image_stride;     // of the features, in elements
    const int16_t* seeds;     // [images][pixels]
    int32_t* counts;          // [images][classes]: of pixels; written by `average`, as the next
    void* prototypes;         // wide [images][classes][channels]: zeros for classes without pixels
    void* prototype_lengths;  // wide [images][classes]; written by `compare`, as the next two
    void* lengths;            // wide [images][pixels]: of the features
    void* cosines;            // wide [images][classes][pixels]: relu of them

    // differentiate
    const void* gradient;    // wide, of the cosines; null: `shares` are given, and spread
    void* weights;           // wide [images][classes][pixels]: scratch
    void* selves;            // wide [images][pixels]: scratch
    void* alongs;            // wide [images][classes]: scratch
    void* shares;            // wide [images][classes][channels]: what each pixel of a class gets through its
                             // prototype; scratch, unless given; null: nothing
    void* feature_gradient;  // as the features, dense
};

// Prototypes: means of the features of each class's pixels.
WSSS_OPERATION(average, Params)
// relu(cosine) of each pixel and prototype, exactly zero for classes without pixels.
WSSS_OPERATION(compare, Params)
WSSS_OPERATION(differentiate, Params)

}  // namespace wsss::prototype
